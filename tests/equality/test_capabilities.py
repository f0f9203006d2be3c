"""A TRL that wasn't tested is tried: what works stays on, what doesn't falls back by itself, the run equals TRL's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from harness import NEWEST, build, parameters, train, train_both
from simulated_trl import CHANGES, simulate
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer, capabilities, probe_trl
from trl_ext.capabilities import CAPABILITIES, Capabilities, nothing_works

# changes of TRL -> the capabilities that they take away, and words of the warning
SIMULATED = [
    (("tokens counted twice",), {"fuse", "regroup", "share", "defer"}, "the gradient differs"),
    *(
        pytest.param(changes, off, words, marks=pytest.mark.nightly)
        for changes, off, words in [
            (
                ("a renamed helper", "an element more from _generate", "a renamed metric"),
                {"defer", "statistics"},
                "low_mean",
            ),
            (("a renamed helper",), {"defer"}, "has no _get_per_token_logps_and_entropies"),
            (("an element more from _generate",), set(), "Trying it, once"),
            (("a renamed metric",), {"statistics"}, "clip_fraction/low_mean, clip_ratio/low_mean"),
            (("rewards with other arguments",), set(CAPABILITIES), "_calculate_rewards takes"),
        ]
    ),
]


def run_simulated(folder: Path, policy: Path, cache: Path, *launcher: str):
    """(what it printed as JSON, what it logged) of stock TRL's and our trainer with the TRL in ``folder``."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "CURVATURE_GRPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "simulated_trl.py"), str(policy), str(folder / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def kept(cache: Path) -> Capabilities | None:
    """The answer on disk, if there is one."""
    found = list(cache.glob("trl-1.17.0-*.json"))
    return Capabilities.from_json(found[0].read_text()) if found else None


@NEWEST
@pytest.mark.parametrize(("changes", "off", "words"), SIMULATED)
def test_each_capability_falls_back_by_itself_and_the_run_equals_trls(changes, off, words, tiny_policy, tmp_path):
    folder = simulate(tmp_path / "trl-1.17", *changes)
    found, log = run_simulated(folder, tiny_policy, tmp_path / "cache")
    answer = kept(tmp_path / "cache")
    assert (set(CAPABILITIES) if answer is None else set(answer.off)) == off
    assert words in log and log.count("differs from the versions that this package knows") == bool(off)
    assert found["largest"] < 1e-5 < found["moved"]
    for mine, its in zip(found["ours"], found["stock"], strict=True):
        dropped = set(answer.other_metrics) if answer else set()
        # while sequences are skipped, entropy_live stands for entropy
        names = its.keys() & mine.keys() if "regroup" not in off else its.keys() - dropped
        names -= {name for name in names if "runtime" in name or "step_time" in name}
        assert {"loss", "grad_norm", "reward", "clip_ratio/high_mean"} <= names
        assert not dropped & mine.keys()
        for name in names:
            assert mine[name] == pytest.approx(its[name], rel=1e-3, abs=1e-6, nan_ok=True), name


@NEWEST
@pytest.mark.nightly
def test_two_ranks_get_the_answer_of_one_probe(tiny_policy, tmp_path):
    folder = simulate(tmp_path / "trl-1.17", "a renamed helper")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    found, log = run_simulated(folder, tiny_policy, tmp_path / "cache", *launcher)
    assert log.count("Trying it, once") == 1 and found["largest"] < 1e-5 < found["moved"]
    # the answer is kept: no second probe
    _, log = run_simulated(folder, tiny_policy, tmp_path / "cache", *launcher)
    assert "Trying it" not in log and "has no _get_per_token_logps_and_entropies" in log


def test_every_change_of_the_simulation_is_tried():
    tried = {change for case in SIMULATED for change in getattr(case, "values", case)[0]}
    assert tried == set(CHANGES)


def test_the_probe_uses_what_it_tries(tmp_path):
    def first_log(*names):
        with capabilities.tried(probe_trl.only(*names)):
            return probe_trl.train(CurvatureGRPOTrainer, str(tmp_path), probe_trl.SETTINGS[0]).logs[0]

    fused, regrouped, shared = first_log("fuse"), first_log("fuse", "regroup"), first_log("fuse", "regroup", "share")
    assert fused["compute/sequences_skipped_frac"] == 0 < regrouped["compute/sequences_skipped_frac"]
    assert shared["compute/tokens_run"] < regrouped["compute/tokens_run"] < fused["compute/tokens_run"]
    deferred = first_log("fuse", "regroup", "defer")
    assert "compute/seconds_log_probs" in deferred and "compute/seconds_log_probs" not in shared
    assert regrouped["clip_ratio/low_mean"] + regrouped["clip_ratio/high_mean"] == 0  # the first of two steps
    assert "interference/sketch_check" in first_log("interference")


@pytest.fixture
def untested(monkeypatch, tmp_path):
    """The installed TRL as if it weren't on the list, with an empty cache; nothing of it is kept afterwards."""
    monkeypatch.setattr(capabilities, "TESTED_TRL", ())
    monkeypatch.setenv("CURVATURE_GRPO_CACHE", str(tmp_path / "cache"))
    capabilities._of_installed.cache_clear()
    yield tmp_path / "cache"
    capabilities._of_installed.cache_clear()


def test_a_tested_version_is_not_tried(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a probe ran"))
    capabilities._of_installed.cache_clear()
    assert capabilities.capabilities() == Capabilities()


def test_the_probe_changes_nothing_of_the_run(untested, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    before, random = dict(os.environ), torch.random.get_rng_state()
    assert capabilities.capabilities() == Capabilities()
    assert dict(os.environ) == before and torch.equal(torch.random.get_rng_state(), random)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a second probe ran"))
    capabilities._of_installed.cache_clear()
    assert capabilities.capabilities() == Capabilities()


FAILURES = {
    "an exception": (
        lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "Traceback\nOSError: full"),
        "OSError: full",
    ),
    "no output": (lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""), "no output"),
    "half a line": (lambda *a, **k: subprocess.CompletedProcess(a, 0, '{"off": ', ""), "no output"),
    "too slow": (lambda *a, **k: (_ for _ in ()).throw(subprocess.TimeoutExpired("probe", 300)), "didn't end"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_probe_that_fails_makes_the_run_trls(failure, untested, tiny_policy, tmp_path, monkeypatch, caplog):
    run, words = FAILURES[failure]
    monkeypatch.setattr(capabilities.subprocess, "run", run)
    if failure != "an exception":
        assert words in capabilities.probe_in_a_process().off["advantages"]
        return
    ours, theirs = train_both(tiny_policy, tmp_path)
    assert caplog.text.count("the trainer does what TRL's does (advantages: the probe failed: OSError: full)") == 1
    before = parameters(theirs.model)
    assert all(torch.equal(value, before[name]) for name, value in parameters(ours.model).items())
    assert not any("interference" in name for log in ours.recorder.logs for name in log)
    assert not list(untested.glob("*.json"))  # the next run tries again


@pytest.mark.parametrize("options", [{"normalization": "max_rl"}, {"resample_zero_variance": True}])
def test_what_trl_cannot_do_is_refused_before_a_model_is_loaded(options, tmp_path, monkeypatch):
    with capabilities.tried(nothing_works("no reason")), pytest.raises(RuntimeError, match="no reason"):
        build(tmp_path / "no such model", tmp_path, processing_class=object(), **options)


@pytest.mark.parametrize("name", ["fuse", "regroup", "share", "defer", "interference"])
def test_a_capability_that_is_off_changes_no_gradient(name, tiny_policy, tmp_path):
    options = {"max_steps": 2, "num_iterations": 2, "beta": 0.05}
    stock = train(tiny_policy, tmp_path / "trl", trainer_class=GRPOTrainer, **options)
    with capabilities.tried(Capabilities({name: "tried"})):
        ours = train(tiny_policy, tmp_path / "ours", **options)
    for mine, its in zip(ours.recorder.gradients, stock.recorder.gradients, strict=True):
        for parameter, value in its.items():
            torch.testing.assert_close(mine[parameter], value, rtol=1e-4, atol=1e-7)
