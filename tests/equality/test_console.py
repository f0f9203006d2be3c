"""The console: what a run prints on a terminal, and where TRL's own output stays."""

import pytest
from harness import build, by_length, train
from transformers import PrinterCallback, ProgressCallback

from trl_ext import console
from trl_ext.console import COLUMNS, ConsoleCallback, format_row
from trl_ext.trainer import components_of


def kinds(trainer):
    return {type(callback) for callback in trainer.callback_handler.callbacks}


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(console, "on_a_terminal", lambda: True)


def test_on_a_terminal_a_run_prints_the_table_in_place_of_the_dictionary(terminal, tiny_policy, tmp_path, capsys):
    saved = {"save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
    trainer = train(tiny_policy, tmp_path, by_length, max_steps=3, **saved)
    assert ConsoleCallback in kinds(trainer) and not {ProgressCallback, PrinterCallback} & kinds(trainer)
    said = capsys.readouterr().out
    heading = next(line for line in said.splitlines() if line.split()[:2] == ["step", "reward"])
    assert heading.split() == [heading for heading, *_ in COLUMNS]
    assert "Saved checkpoint-2." in said and "'loss'" not in said
    row = next(line for line in said.splitlines() if line.split()[:1] == ["3"])
    assert len(row) == len(heading) and row.endswith("0:00:00")


def test_a_resumed_and_a_stopped_run_say_so(terminal, tiny_policy, tmp_path, capsys):
    saved = {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": False, "max_steps": 2}
    train(tiny_policy, tmp_path, by_length, **saved)
    train(tiny_policy, tmp_path, by_length, resume=str(tmp_path / "checkpoint-1"), **saved)
    assert "Going on at step 1 of 2." in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"disable_tqdm": True}, {"disable_tqdm": False}])
def test_elsewhere_trl_prints_as_ever(options, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, **options)
    assert (PrinterCallback if options["disable_tqdm"] else ProgressCallback) in kinds(trainer)
    assert ConsoleCallback not in kinds(trainer)


def test_the_bar_says_which_stage_runs(terminal, tiny_policy, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ConsoleCallback, "_show", lambda self, doing: shown.append(doing))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = train(tiny_policy, tmp_path, by_length, max_steps=1, disable_tqdm=False, **evaluated)
    assert {"generating", "rewards", "evaluating, batch 1", "saving"} <= set(shown)
    assert shown[shown.index("rewards") + 1] == "forward and backward"  # generation and rewards are within the step
    assert components_of(trainer).seconds.on_change is None


def test_a_metric_that_is_no_number_is_shown_as_it_is():
    assert format_row({"step": 3, "reward": "n/a", "left": "0:00:01"}).split() == ["3", "n/a", "0:00:01"]


class OwnBar(ProgressCallback):
    """A user's subclass."""


def test_a_user_s_own_bar_stays(terminal, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, disable_tqdm=False, callbacks=[OwnBar()])
    assert OwnBar in kinds(trainer) and ProgressCallback not in kinds(trainer)


def test_an_error_leaves_no_bar_behind(terminal, tiny_policy, tmp_path):
    """The bar ends when the next run begins, or with the program."""
    trainer = build(tiny_policy, tmp_path, by_length, max_steps=1, disable_tqdm=False)
    (console_callback,) = (one for one in trainer.callback_handler.callbacks if type(one) is ConsoleCallback)
    trainer.training_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    left = console_callback.bar
    assert left is not None
    del trainer.training_step
    trainer.train()
    assert left.finished or not left.live.is_started
    assert console_callback.bar is None and trainer.stage_seconds.on_change is None
