"""What the report reads: logs and files of runs that were killed, resumed, are odd, or hold much."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
from harness import prompts, question, reward_with_dead, train
from run_folders import change_config, copy, gradients, log_of, metrics, page_of

from grpo_kernels.recorder.files import read_interference, write_step
from trl_ext.report.charts import curves_of_a_run
from trl_ext.report.command import main
from trl_ext.report.completions import read_completions, rows_of
from trl_ext.report.groups import group_runs, mean_and_band
from trl_ext.report.numbers import report_numbers
from trl_ext.report.read_run import Curve, read_run
from trl_ext.report.run_files import CONFIG_FILE, LOG_FILE, STARTED
from trl_ext.report.sections import Curves


def test_a_run_that_was_killed(reported_run, tmp_path, capsys):
    """No final state, a checkpoint at step 4, the log up to step 6 with half a line, half a file of a step."""
    folder = copy(reported_run, tmp_path / "killed")
    (folder / "trainer_state.json").unlink()
    shutil.rmtree(folder / "checkpoint-6")
    with open(folder / LOG_FILE, "a") as file:
        file.write('{"reward": 0.5, "st')
    broken = folder / "interference" / "step_00000002.npz"
    broken.write_bytes(broken.read_bytes()[:100])
    page_of(folder, folder=tmp_path)
    said = capsys.readouterr().out
    assert "up to step 6" in said and "killed: 2 skipped" in said
    assert "step_00000002.npz is skipped" in said and "1 of 8 lines are skipped" in said
    run = read_run(folder)
    assert len(run.records) == 5 and run.series("reward")[0] == [1, 2, 3, 4, 5, 6]
    (folder / LOG_FILE).unlink()
    assert read_run(folder).series("reward")[0] == [1, 2, 3, 4], "the newest checkpoint's"
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert read_run(folder).series("interference/cos_mean")[0] == [1, 3, 4, 5, 6], "the files' own metrics"


def test_missing_values_are_gaps(tmp_path):
    """A metric that most entries have, NaN in one and not there in another; of a rare one the others aren't gaps."""
    entries = [{"step": step, "loss": 0.0, "reward": 0.5, "grad_norm": float(step)} for step in range(1, 8)]
    entries[2]["grad_norm"] = math.nan
    del entries[4]["grad_norm"]
    entries[0]["theory/r1"] = entries[5]["theory/r1"] = 2.0
    entries.insert(3, {"step": 3, "eval_accuracy": 0.5})
    run = read_run(log_of(tmp_path / "run", entries))
    curves = report_numbers(run).curves
    assert curves["learning"]["grad_norm"] == Curve([1, 2, 3, 4, 5, 6, 7], [1, 2, None, 4, None, 6, 7])
    assert curves["theory"]["theory/r1"] == Curve([1, 6], [2, 2])
    assert curves["main"]["eval_accuracy"] == Curve([3], [0.5])
    assert run.series("grad_norm")[0] == [1, 2, 4, 6, 7] and run.last("grad_norm") == 7
    figure = curves_of_a_run(Curves("", "", {"grad_norm": "norm"}), curves["learning"], {})
    assert figure.data[0].y == (1, 2, None, 4, None, 6, 7) and not figure.data[0].connectgaps
    band = mean_and_band(group_runs([run])[0], "grad_norm")
    assert [math.isnan(value) for value in band.mean] == [False, False, True, False, True, False, False]


def test_a_step_evaluated_twice_is_explained(tmp_path):
    entries = [{"step": 0, "eval_accuracy": 0.4}, {"step": 1, "loss": 0.0, "reward": 0.5}]
    entries += [{"step": 1, "eval_accuracy": 0.5}, {"step": 1, "eval_accuracy": 0.7}]
    numbers = report_numbers(read_run(log_of(tmp_path / "run", entries)))
    assert numbers.curves["main"]["eval_accuracy"] == Curve([0, 1], [0.4, pytest.approx(0.6)])
    (note,) = numbers.notes
    assert note.startswith("Step 1 was evaluated 2 times (0.500, 0.700): answers are sampled")
    assert note in page_of(tmp_path / "run", folder=tmp_path)


def test_a_log_that_goes_back_has_each_step_once(tmp_path):
    """A run of an earlier version, resumed at step 4: the later entries count."""
    logs = [{"step": step, "reward": 0.5} for step in range(1, 7)] + [{"step": step, "reward": 9.0} for step in (5, 6)]
    assert read_run(log_of(tmp_path / "run", logs)).series("reward") == ([1, 2, 3, 4, 5, 6], [0.5] * 4 + [9.0] * 2)


def test_a_run_that_starts_anew_in_a_used_folder(reported_run, tmp_path):
    """Its log counts, not the earlier run's state and checkpoints; files from before it began are named."""
    folder = copy(reported_run, tmp_path / "again")
    log = (folder / LOG_FILE).read_text().splitlines()
    (folder / LOG_FILE).write_text(log[0])
    started = json.loads((folder / CONFIG_FILE).read_text())[STARTED]
    change_config(folder, **{STARTED: started + 3600})
    run = read_run(folder)
    assert run.last_step == 1 and not run.records
    assert any("6 files are skipped, they are older than the run" in problem for problem in run.problems)


def test_where_a_run_goes_on(tiny_policy, tmp_path):
    """Killed in the middle of a line, resumed two steps earlier, twice: each step once, and no empty line."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "interference_every": 0}
    train(tiny_policy, tmp_path, **options)
    with open(tmp_path / LOG_FILE, "a") as file:
        file.write('{"reward": 0.5')
    started = json.loads((tmp_path / CONFIG_FILE).read_text())[STARTED]
    for _ in range(2):
        train(tiny_policy, tmp_path, **options, resume=str(tmp_path / "checkpoint-2"))
    assert "" not in (tmp_path / LOG_FILE).read_text().splitlines()
    run = read_run(tmp_path)
    assert run.series("reward")[0] == [1, 2, 3, 4] and len(run.problems) == 1
    assert run.config[STARTED] == started


@pytest.mark.parametrize(
    "change",
    [
        {"reward": np.zeros(3)},
        {"coefficient": np.zeros(2)},
        {"prompt_id": np.arange(2)},
        {"step": np.arange(2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_whose_parts_do_not_fit(change, tmp_path):
    for step in (1, 2):
        path = write_step(tmp_path, step, gradients(8, 4), metrics(), range(8), ["text"] * 8)
    arrays = dict(np.load(path))
    np.savez_compressed(path, **{**arrays, **change})
    run = read_run(tmp_path)
    assert [record.step for record in run.records] == [1] and len(run.problems) == 1
    assert path.name in run.problems[0]
    report_numbers(run)


def test_odd_lines_in_a_log(tmp_path):
    odd = [
        '{"step": NaN, "reward": 1}',
        "[" * 100_000,
        "[1]",
        '{"step": 3, "reward": Infinity, "phase": 7}',
        f'{{"step": 4, "reward": {"9" * 400}}}',
        '{"step": 5, "reward": "high"}',
        "",
    ]
    folder = log_of(tmp_path / "odd", [{"step": 1, "reward": 0.5, "phase": 2}, *odd, {"step": 6, "reward": 0.75}])
    (folder / "sampled_completions.json").write_text('[{"step":')
    run = read_run(folder)
    assert run.series("reward") == ([1, 6], [0.5, 0.75])
    numbers = report_numbers(run)
    assert numbers.completions == []
    assert [span.phase for span in numbers.phases] == [2]
    (found,) = [one for one in numbers.diagnosis.verdicts if one.name == "not_finite"]
    assert found.onset == 3 and found.level == "critical"
    main(["report", str(folder), "-o", str(tmp_path / "page.html"), "--json", str(tmp_path / "numbers.json")])
    json.loads((tmp_path / "numbers.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))


# ---- answers that are kept


def test_answers_are_kept_and_thinned(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.report.completions.MOST", 40)
    options = {"gradient_accumulation_steps": 4, "interference_every": 1, "interference_dim": 16, "max_steps": 14}
    train(tiny_policy, tmp_path, reward_with_dead(0.4), **options)
    rows = read_completions(tmp_path)
    steps = sorted({row.step for row in rows})
    assert 8 <= len(rows) <= 40 and steps[0] == 1 and {b - a for a, b in pairwise(steps)} <= {2, 4}
    for step in steps:
        of_step = [row for row in rows if row.step == step]
        by_prompt = [of_step[i : i + 4] for i in range(0, len(of_step), 4)]
        assert len(by_prompt) in (1, 2) and all(len({row.prompt for row in group}) == 1 for group in by_prompt)
        if len(by_prompt) == 2:  # one live, one dead
            assert any(row.advantage for row in by_prompt[0]) and not any(row.advantage for row in by_prompt[1])
        assert all(isinstance(value, float) for row in of_step for value in row.rewards.values())
    records = {record.step: record for record in read_interference(tmp_path)}
    assert any(rows[0].prompt.startswith(text[:40]) for text in records[1].prompt_text_P)


def test_an_evaluations_answers_are_not_the_steps(tiny_policy, tmp_path):
    """TRL keeps both in one table, and a step on older rollouts follows an evaluation."""
    held = type(prompts(8)).from_dict({"prompt": [question(f"held out {i}") for i in range(8)]})
    options = {"num_iterations": 2, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 4}
    train(tiny_policy, tmp_path, interference_every=1, eval_dataset=held, max_steps=6, **options)
    rows = read_completions(tmp_path)
    assert rows and not any("held out" in row.prompt for row in rows)


@pytest.mark.parametrize(
    "rewards", [[0, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 1], [0.5, 0.1, 0.9, 0.3, 0.2, 0.4, 0.8, 0.7]]
)
def test_saved_answers_span_the_rewards(rewards):
    """The lowest and the highest of a group are among the four that are kept."""
    logs = {"prompt": ["p"] * 8, "completion": ["a"] * 8, "advantages": [1.0] * 8, "rewards": {"f": rewards}}
    kept = [row.rewards["f"] for row in rows_of(logs, 1, 8)]
    assert len(kept) == 4 and min(kept) == min(rewards) and max(kept) == max(rewards)
