"""``python -m trl_ext ablate`` on scripts that know nothing of it: tried, compared, killed, repeated."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from harness import OPTIONS
from processes import ROOT, start

from trl_ext.ablate import command, launch, run_script
from trl_ext.ablate.check_script import check_manifest, check_result
from trl_ext.ablate.launch import Launcher, Progress
from trl_ext.ablate.study import Result, Spec, Variant, make_run

SCRIPT = Path(__file__).parents[1] / "ablated_script.py"
TRAINING = {
    **{
        name: value
        for name, value in OPTIONS.items()
        if not isinstance(value, dict) and name not in ("seed", "learning_rate")
    },
    "generation_kwargs": json.dumps(OPTIONS["generation_kwargs"]),
    "eval_strategy": "steps",
    "eval_steps": 1,
}


def script_arguments(policy, trouble=""):
    listed = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    return ["--model_name_or_path", str(policy), "--learning_rate", "0.01", "--trouble", trouble, *listed]


@pytest.fixture
def forked(monkeypatch):
    """Runs of the tool are forked from a process that has imported everything, in place of new Pythons."""

    def wait(launcher, run, output, device):
        spec = str(run.folder / "spec.json")
        return start(1, run_script.main, spec, folder=run.folder / "out").finish()[0]

    monkeypatch.setattr(Launcher, "_wait", wait)


def ablate(folder, policy, *options):
    command.main([str(SCRIPT), *options, "--output_dir", str(folder), "--", *script_arguments(policy)])


OPTIONS_OF_A_STUDY = ("--normalization", "std", "mean", "--seeds", "0", "--rates", "0.02")


def check_study(folder, capsys):
    """The files of a study with ``OPTIONS_OF_A_STUDY``. Returns its runs: mean, std."""
    assert "mean and std: too few seeds to tell (1 seed;" in capsys.readouterr().out
    runs = sorted((folder / "runs").iterdir())
    for run, name in zip(runs, ("mean", "std"), strict=True):
        spec, result = (json.loads((run / file).read_text()) for file in ("spec.json", "result.json"))
        assert spec["options"]["normalization"] == name
        assert (result["status"], result["trainer"]) == ("finished", "CurvatureGRPOTrainer")
        assert result["config"]["learning_rate"] == 0.02
        assert [entry["step"] for entry in result["logs"] if "eval_reward" in entry] == [1, 2]
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 2 * 2
    page = (folder / "answer.html").read_text()
    assert "too few seeds to tell" in page
    assert "plotly-gzip" in page
    return runs


def test_a_script_is_compared_and_a_repeated_command_trains_what_is_missing(tiny_policy, tmp_path, capsys, forked):
    folder, file = tmp_path / "study", tmp_path / "a.json"
    ablate(folder, tiny_policy, *OPTIONS_OF_A_STUDY, "--json", str(file))
    runs = check_study(folder, capsys)
    assert json.loads(file.read_text())["metric"] == "eval_reward"
    (runs[0] / "result.json").unlink()  # as after a kill
    before = (runs[1] / "result.json").stat().st_mtime_ns
    ablate(folder, tiny_policy, *OPTIONS_OF_A_STUDY)
    assert "[2/2] mean at 0.02, seed 0: eval_reward" in capsys.readouterr().out
    assert (runs[1] / "result.json").stat().st_mtime_ns == before


def test_a_sweep_with_a_placebo_and_a_run_that_fails(tiny_policy, tmp_path, capsys, forked):
    options = ("--normalization", "std", "mean", "--seeds", "0", "1", "2", "--tuning-seeds", "1", "--factors", "1", "4")
    folder = tmp_path / "study"
    command.main(
        [str(SCRIPT), *options, "--output_dir", str(folder), "--", *script_arguments(tiny_policy, "fails at seed 1")]
    )
    printed = capsys.readouterr().out
    assert "15 runs (6 to choose learning rates, 9 to compare)" in printed
    assert "up to 6 more where a best rate lies at its sweep's edge" in printed
    assert printed.count("FAILED: RuntimeError: the reward model isn't there") in (2, 3)
    assert "std (placebo): learning rate" in printed
    assert "Placebo: std tuned on other seeds gets" in printed
    assert "Failed or NaN runs (std 1, mean 1" in printed


@pytest.mark.nightly
def test_the_command_as_users_run_it(tiny_policy, tmp_path, capfd):
    folder = tmp_path / "study"
    tool = ["-m", "trl_ext", "ablate", str(SCRIPT), *OPTIONS_OF_A_STUDY, "--output_dir", str(folder), "--jobs", "2"]
    done = subprocess.run([sys.executable, *tool, "--one-thread", "--", *script_arguments(tiny_policy)], timeout=600)
    assert done.returncode == 0
    check_study(folder, capfd)


def tried(tmp_path, policy, trouble, mode="dry", **options):
    """The result of a script that is run with these options set from outside, in a process of its own."""
    given = {
        "normalization": "mean",
        "learning_rate": 0.003,
        "seed": 1,
        "output_dir": str(tmp_path / "trainer"),
        **options,
    }
    spec = Spec(str(SCRIPT), script_arguments(policy, trouble), given, mode, str(tmp_path / "result.json"))
    spec.write(tmp_path / "spec.json")
    start(1, run_script.main, str(tmp_path / "spec.json"), folder=tmp_path / "out").finish()
    return Result.read(tmp_path / "result.json")


def test_a_dry_run_stops_at_train_with_the_options_that_were_set(tiny_policy, tmp_path):
    result = tried(tmp_path, tiny_policy, "")
    assert (result.status, result.ignored, result.logs) == ("stopped", {}, [])
    assert (result.config["learning_rate"], result.config["normalization"]) == (0.003, "mean")
    assert result.has_curvature


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("hard-coded", "the script sets options itself, so they can't be varied: learning_rate is 0.001 and not 0.003"),
        ("optimizer", "the script gives the trainer an optimizer of its own"),
        ("fails at seed 1", "RuntimeError: the reward model isn't there"),
    ],
)
def test_what_a_script_does_itself_is_named_before_anything_is_trained(tiny_policy, tmp_path, trouble, message):
    run = make_run(tmp_path, Variant("mean", {"normalization": "mean"}), 0.003, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_result(tried(tmp_path, tiny_policy, trouble), run, "stopped")


def test_steps_and_an_evaluation_are_timed(tiny_policy, tmp_path):
    result = tried(tmp_path, tiny_policy, "", mode="time", max_steps=50)
    assert result.status == "finished"
    assert max(entry["step"] for entry in result.logs) == 3
    assert min(result.start, result.step, result.evaluation) > 0
    assert result.config["max_steps"] == 50


def test_a_script_that_never_evaluates_is_compared_by_its_reward(tiny_policy, tmp_path):
    """The script has an evaluation set but never evaluates, and epochs set the number of steps."""
    once = {"eval_strategy": "no", "max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 3}
    result = tried(tmp_path, tiny_policy, "", mode="time", **once)
    assert not any(name.startswith("eval_") for entry in result.logs for name in entry)
    last = result.logs[-2]
    assert result.config["max_steps"] == round(1.5 * last["step"] / last["epoch"]), last


def test_a_function_makes_the_trainer(tiny_policy, tmp_path):
    """``module:function`` gets a ``CurvatureGRPOConfig`` with the options that were set."""
    given = {"normalization": "mean", "learning_rate": 0.003, "seed": 1, "output_dir": str(tmp_path / "trainer")}
    listed = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    spec = Spec("ablated_script:from_config", listed, given, "dry", str(tmp_path / "result.json"))
    spec.write(tmp_path / "spec.json")
    policy = {"ABLATED_POLICY": str(tiny_policy)}
    start(1, run_script.main, str(tmp_path / "spec.json"), folder=tmp_path / "out", **policy).finish()
    result = Result.read(tmp_path / "result.json")
    assert (result.status, result.error) == ("stopped", "")
    assert result.config["normalization"] == "mean"


def test_runs_of_another_script_are_not_mixed(tmp_path):
    launcher = Launcher(str(SCRIPT), ["--a", "1"], "", 1, True)
    check_manifest(launcher, tmp_path, {"the data of seed 0": "x"})
    check_manifest(launcher, tmp_path, {"the data of seed 0": "x", "what the script imports": "y"})
    with pytest.raises(ValueError, match="from before the data of seed 0 changed"):
        check_manifest(launcher, tmp_path, {"the data of seed 0": "z"})
    with pytest.raises(ValueError, match="from before the script's arguments changed"):
        check_manifest(Launcher(str(SCRIPT), ["--a", "2"], "", 1, True), tmp_path)


# ---- the end

STUBBORN = """
import os, pathlib, signal, sys, time
from trl_ext.ablate.run_script import end_with_tool
end_with_tool()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder = pathlib.Path(sys.argv[-1]).parent
(folder / "result.json").write_text('{"status": "finished"}')  # as a script that saves and ends early
(folder / "pid").write_text(str(os.getpid()))
time.sleep(300)
"""


def train_stubborn(folder):
    launch.GRACE = 0.5
    launcher = Launcher("train.py", [], shlex.join([sys.executable, "-c", STUBBORN]), 1, False)
    launcher.train([make_run(Path(folder), Variant("std", {}), 1e-4, 0)], print)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_run_outlives_the_command(number, tmp_path):
    """The run takes no notice of SIGTERM. Interrupted, it isn't taken for finished."""
    run = make_run(tmp_path, Variant("std", {}), 1e-4, 0)
    started = start(1, train_stubborn, str(tmp_path), folder=tmp_path / "out", PYTHONPATH=str(ROOT))
    started.wait_for(run.folder / "pid")
    pid = (run.folder / "pid").read_text()
    os.kill(started.processes[0].pid, number)
    assert started.finish(60) == [1 if number == signal.SIGINT else -number]
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert number == signal.SIGKILL or run.result() is None


def test_launchers_that_take_every_gpu_run_one_at_a_time():
    with pytest.raises(ValueError, match="--jobs 2 with --launcher accelerate launch: it takes every GPU for one run"):
        command.parse([str(SCRIPT), "--jobs", "2", "--launcher", "accelerate launch"])


def test_a_folder_has_one_command_at_a_time(tmp_path):
    with FileLock(tmp_path / "study.lock"), pytest.raises(SystemExit, match="another command is at work in"):
        command.main([str(SCRIPT), "--normalization", "std", "mean", "--output_dir", str(tmp_path)])


def test_a_study_whose_runs_all_failed_has_no_answer(tmp_path):
    run = make_run(tmp_path, Variant("std", {}), 1e-4, 0)
    launcher = Launcher("train.py", [], "", 1, False)
    launcher.failed(run, "no GPU")
    options = argparse.Namespace(list=False, submitit=None)
    study = command.Study(options, launcher, tmp_path, [run.variant])
    with pytest.raises(ValueError, match=r"every run failed, for example .* no GPU"):
        study.trained([run], Progress(1, 1, "reward"))


def test_every_run_orders_sets_alike(tmp_path, monkeypatch):
    """A script may make its data from a set, whose order depends on Python's seed of hashes."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(Launcher, "command", lambda self, run: [sys.executable, "-c", "print({*'abcdefgh'})"])
    launcher = Launcher(str(SCRIPT), [], "", 1, False)
    runs = [make_run(tmp_path, Variant(name, {}), 0.01, 0) for name in ("std", "mean")]
    for run in runs:
        launcher.start(run, "train")
    first, second = ((run.folder / "output.txt").read_text() for run in runs)
    assert first == second and "'a'" in first
