"""examples/ablation/ablate.py as users run it: a sweep, a comparison, files; stopped, killed, given nonsense."""

import csv
import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
from processes import run_script, start

from examples.ablation import ablate, runs

SCRIPT = Path(ablate.__file__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "std", "grpo"], "unknown normalization 'grpo': choose from none, mean"),
        (["--methods", "power"], "normalization 'power' needs the option 'alpha'"),
        (["--methods", "power:alpha=2"], "alpha=2.0 must be a number in [0, 1]"),
        (["--methods", "power:alpha"], "--methods power:alpha: 'alpha' isn't option=number, as in power:alpha=0.5"),
        (["--methods", "power:alpha=x"], "'alpha=x' isn't option=number"),
        (["--methods", "std:alpha=1"], "normalization 'std' has no option 'alpha'"),
        (["--methods", "std", "mean", "std"], "--methods has std more than once"),
        (["--learning_rates", "1e-4", "0.0001"], "--learning_rates has 0.0001 more than once"),
        (["--learning_rates", "0"], "--learning_rates 0.0 must be a number above 0"),
        (["--seeds", "1", "2", "--sweep_seeds", "3", "2"], "--seeds and --sweep_seeds share 2"),
        (["--max_steps", "25"], "--max_steps 25 must be a multiple of --eval_every 10"),
        (["--eval_every", "0"], "--eval_every 0 must be at least 1"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--num_generations", "1"], "--num_generations 1 must be at least 2 and divide a step's 128"),
        (["--num_generations", "6"], "--num_generations 6 must be at least 2 and divide"),
        (["--answers_per_step", "0"], "--num_generations 8 must be at least 2 and divide a step's 0"),
        (["--reward_noise", "0.5"], "--reward_noise 0.5 must be in [0, 0.5)"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1.0 must be a finite number that is not negative"),
        (["--target_accuracy", "70"], "--target_accuracy 70.0 must be in (0, 1]"),
        (["--dataset", "arithmetic", "--levels", "7"], "levels=(7,): choose from"),
        (["--levels", "1"], "--levels goes with --dataset arithmetic"),
        (
            ["--dataset", "arithmetic", "--eval_size", "400"],
            "count=400 is more than the held_out problems that levels (1, 4) have",
        ),
        (["--optim", "adam_w"], "adam_w"),
        (["--model_name_or_path", "nowhere"], "--model_name_or_path nowhere: no folder with a config.json"),
        (["--output_dir", "/dev/null/runs"], "--output_dir /dev/null/runs can't be written to"),
    ],
)
def test_bad_input_ends_before_anything_is_trained(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Workers", lambda *args, **kwargs: pytest.fail("got as far as the workers"))
    if "--output_dir" not in arguments:
        arguments = [*arguments, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        ablate.main(arguments)
    assert message in str(stopped.value), stopped.value


def test_matplotlib_is_asked_for_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"the plot needs matplotlib: pip install matplotlib"):
        ablate.main(["--output_dir", str(tmp_path)])


def test_runs_differ_in_method_learning_rate_and_seed_alone(tmp_path):
    options = ablate.parse_arguments([])
    one, other = (ablate.run_settings(options, *run) for run in (("std", 1e-4, 0), ("power:alpha=0.5", 2e-4, 1)))
    different = {name for name in one.training if one.training[name] != other.training[name]}
    assert different == {"normalization", "normalization_kwargs", "learning_rate", "seed"}
    assert dataclasses.replace(one, method=other.method, training=other.training) == other
    files = {runs.run_file(tmp_path, settings) for settings in (one, other)}
    longer = ablate.parse_arguments(["--max_steps", "100"])
    assert len(files | {runs.run_file(tmp_path, ablate.run_settings(longer, "std", 1e-4, 0))}) == 3


def options_of(policy, folder, *more):
    options = (
        "--methods mean power:alpha=0.5 --learning_rates 1e-3 2e-3 --sweep_seeds 7 --seeds 0 1 --max_steps 1 "
        "--eval_every 1 --eval_size 4 --target_accuracy 0.5"
    )
    return [*options.split(), "--model_name_or_path", str(policy), "--output_dir", str(folder), *more]


def begin(*arguments, **variables):
    """The script, forked from a process that has imported everything; its one worker hasn't."""
    policy, folder, *more = arguments
    given = options_of(policy, folder, *more, "--jobs", "1")
    variables |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    outputs = folder.with_name(f"{folder.name}-outputs")
    return start(1, run_script, SCRIPT, given, folder=outputs, cwd=SCRIPT.parents[1], **variables)


def read_csv(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_script(launch, tiny_policy, tmp_path):
    """Sweep, comparison and files. Then with a seed more: only what isn't done is trained, and a failure is named."""
    done = launch("ablation/ablate.py", *options_of(tiny_policy, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "[8/8]" in done.stdout and "min left" in done.stdout
    rows = read_csv(tmp_path / "results.csv")
    # (2 methods x 2 rates x 1 seed + 2 methods x 2 seeds) runs, steps 0 and 1
    assert len(rows) == 8 * 2
    trained = {(row["phase"], row["method"], row["learning_rate"], row["seed"]) for row in rows}
    assert len(trained) == 8 and {run[3] for run in trained if run[0] == "final"} == {"0", "1"}
    assert all(0 <= float(row["held_out_accuracy"]) <= 1 for row in rows)
    assert all((row["reward"] == "") == (row["step"] == "0") for row in rows)
    text = (tmp_path / "table.md").read_text()
    table = [line.split(" | ") for line in text.splitlines()[2:4]]
    assert [cells[0] for cells in table] == ["| `mean`", "| `power:alpha=0.5`"]
    assert all(cells[1] in ("0.001 (edge of the grid)", "0.002 (edge of the grid)") for cells in table)
    assert text in done.stdout
    assert "| final held-out accuracy | puzzles | reversals | sorting | sums |" in text  # the mixture, by task
    assert (tmp_path / "tasks.png").exists()
    assert (tmp_path / "ablation.png").read_bytes()[1:4] == b"PNG"

    files = sorted((tmp_path / "runs").iterdir())
    assert len(files) == 8
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in files}
    broken = next(file for file in files if file.name.startswith("power-alpha=0.5") and "seed1" in file.name)
    broken.write_text(before[broken][1][: len(before[broken][1]) // 2])  # cut off
    options = ablate.parse_arguments(options_of(tiny_policy, tmp_path))
    rate = float(table[0][1].split()[0])
    runs.run_file(tmp_path, ablate.run_settings(options, "mean", rate, 2)).mkdir()  # no file can take its place

    again = begin(tiny_policy, tmp_path, "--seeds", "0", "1", "2")
    assert again.finish() == [1]
    assert "4 of 4 runs were done before" in again.text() and "3 of 6 runs were done before" in again.text()
    assert f"FAILED mean at {rate:g}, seed 2: IsADirectoryError" in again.text()
    assert again.text().strip().endswith(f"error: 1 failed: mean at {rate:g}, seed 2")
    text = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[3].split(" of ")[1] for line in text.splitlines()[2:4]] == ["2", "3"]
    # the one done again is the first of its process now, and equal
    assert [row for row in read_csv(tmp_path / "results.csv") if row["seed"] != "2"] == rows
    for file in files:
        assert file.read_text() == before[file][1]
        assert (file.stat().st_mtime_ns == before[file][0]) == (file != broken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_script(number, tiny_policy, tmp_path):
    """Its worker is at the first of ten thousand steps, hours before the last, when the signal comes."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder = tmp_path / "runs"
    started = begin(tiny_policy, folder, "--max_steps", "10000", TMPDIR=str(scratch))
    deadline = time.monotonic() + 100
    while not list(scratch.glob("tmp*")):  # the run's own folder, made when it begins
        assert started.running() and time.monotonic() < deadline, started.text()
        time.sleep(0.1)
    pid = started.processes[0].pid
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert workers
    os.kill(pid, number)
    assert started.finish(100) == [1 if number == signal.SIGINT else -number]
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list((folder / "runs").iterdir())
    assert number != signal.SIGINT or "repeat the command to go on" in started.text()


def test_a_run_file_is_whole_or_absent(tmp_path):
    runs.write_whole(tmp_path / "run.json", "{}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "{}"}
