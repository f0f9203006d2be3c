"""``python -m trl_ext check``, and the watch that looks at a run while it goes."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from harness import build, logged, messages, train
from sick_runs import WIDE, Answers, all_of, sick_run, some
from two_process_worker import start_processes

from trl_ext.report.watch import Watch, looked_at

ANSWERS = {"rollout_func": Answers(), "interference_every": 0, **WIDE}


@pytest.fixture(scope="module")
def folders(tiny_policy, tmp_path_factory):
    made = {}
    for name in ("all_wrong", "no_progress"):
        made[name] = tmp_path_factory.mktemp(name)
        sick_run(name, tiny_policy, made[name])
    return made


def check(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl_ext", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("trl_ext", run_name="__main__")
    return stopped.value.code


def test_the_command(folders, tmp_path, monkeypatch, capsys):
    file = tmp_path / "verdicts.json"
    assert check(monkeypatch, folders["all_wrong"], "--json", file) == 1
    printed = capsys.readouterr().out
    assert "CRITICAL: Every answer gets a low reward, since step 1" in printed and "-> Too hard" in printed
    assert "Can't be told:" in printed and "use_vllm=True" in printed
    ((told,),) = (one["verdicts"] for one in json.loads(file.read_text()).values())
    assert told["name"] == "all_wrong" and told["onset"] == 1
    assert check(monkeypatch, folders["no_progress"]) == 0
    assert check(monkeypatch, folders["no_progress"], folders["all_wrong"]) == 1
    capsys.readouterr()
    assert check(monkeypatch, tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err


# ---- while it goes


def test_it_is_said_once_and_logged(tiny_policy, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trainer = sick_run("all_wrong", tiny_policy, tmp_path)
    (said,) = messages(caplog, "Every answer gets a low reward")
    assert "since step 1" in said and "num_generations" in said
    assert [entry["verdicts/critical"] for entry in logged(trainer, "verdicts/critical")] == [1.0] * 4
    assert trainer.state.global_step == 10


def test_it_stops_where_that_is_asked_for(tiny_policy, tmp_path, caplog):
    options = {**ANSWERS, "stop_on": "critical", "max_steps": 10, "save_strategy": "steps", "save_steps": 100}
    with caplog.at_level("WARNING"):
        trainer = train(tiny_policy, tmp_path, all_of(0.0), **options)
    assert trainer.state.global_step == 6 and (tmp_path / "checkpoint-6").is_dir()
    assert messages(caplog, "stops at step 6")
    healthy = train(tiny_policy, tmp_path / "other", some, **options)
    assert healthy.state.global_step == 10


def test_an_alert_that_fails_keeps_the_watch(tiny_policy, tmp_path, monkeypatch, caplog):
    import wandb

    monkeypatch.setattr(wandb, "run", type("Run", (), {"alert": lambda self, **_: 1 / 0, "url": None})())
    trainer = build(tiny_policy, tmp_path, all_of(0.0), stop_on="critical", max_steps=12, **ANSWERS)
    watch = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Watch))
    watch.run = replace(watch.run, report_to=("wandb",))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 6 and messages(caplog, "don't go to wandb: ZeroDivisionError")


def test_a_long_log_is_looked_at_less_often():
    """A run that is resumed at any length looks at what an undisturbed one has looked at last."""
    looks = sorted({looked_at(length) for length in range(2000)})
    assert looks[:6] == [0, 1, 2, 3, 4, 5] and len(looks) < 300
    for length in (1, 7, 60, 61, 1999):
        assert looked_at(length) == max(look for look in looks if look <= length)


def test_two_processes_stop_together(tiny_policy, tmp_path):
    """Also where one of them can't look."""
    options = {"dead": 1.0, "stop_on": "critical", "max_steps": 16, "interference_every": 0, "blind": 1}
    started = start_processes(2, tiny_policy, tmp_path / "run", **options)
    assert started.finish() == [0, 0], started.text()[-3000:]
    logs = [torch.load(tmp_path / "run" / f"result.{rank}.pt")["logs"] for rank in range(2)]
    assert "stops at step 12" in started.text() and "Every answer gets a high reward" in started.text()
    assert [max(entry["step"] for entry in log) for log in logs] == [12, 12]
