"""Sequences of advantage 0, scored beside a logged step: training unchanged, every normalisation told."""

import math

import pytest
import torch
from harness import PLAIN, TIMINGS, assert_what_if, logged, lora, messages, one_step, parameters, train
from two_process_worker import run_processes

from trl_ext import CurvatureGRPOTrainer, read_interference
from trl_ext.report.what_if_command import main as what_if_command

HIDDEN = ("none", "global", "batch_mean", "shrinkage")  # from them advantage 0 hides what they need


def half_dead(prompts, completion_ids, **kwargs):
    """Every other group is all right or all wrong, the others are graded."""
    return [
        float(len(str(prompt)) % 4 < 2) if len(str(prompt)) % 2 else (sum(ids) % 7) / 6
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


SCORED = {"interference_every": 1, "what_if_dead": True, "per_device_train_batch_size": 16, "max_steps": 3}
OPTIONS = {
    "plain": {},
    "LoRA": {"peft_config": lora()},
    "all rows": {"skip_zero_advantage": False},
    "checkpointing": {"gradient_checkpointing": True},
    "cispo": {"loss_type": "cispo"},
}
LONG = ("all rows", "checkpointing")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) if n in LONG else n for n in OPTIONS])
def test_against_separate_backward_passes(name, tiny_policy, tmp_path):
    """In a run with ``std``, half of whose groups are all equal, as in runs with ``none``: their scores aren't lost."""

    def gradient_and_log(method, **more):
        options = {**OPTIONS[name], "normalization": method, **more}
        return one_step(tiny_policy, tmp_path / f"{method}{len(more)}", half_dead, **options)

    now, log = gradient_and_log("std", what_if_dead=True)
    without, bare = gradient_and_log("std")
    assert torch.equal(now, without)  # bit for bit
    assert 0 < bare["normalization/zero_variance_frac"] < 1
    for key in ("interference/cos_mean", "interference/sketch_check", "what_if/max_rl/cos"):
        assert (key in bare) == (key in log)
        if key in bare:
            assert log[key] == pytest.approx(bare[key], abs=1e-9)
    for method in HIDDEN:
        assert f"what_if/{method}/cos" not in bare
        assert_what_if(log, method, gradient_and_log(method)[0], now)
    assert log["what_if/none/cos"] < 0.99  # all-right groups push, too


@pytest.mark.parametrize("method", ["none", "median_mad", "iqr"])
def test_scores_that_the_method_itself_hides(method, tiny_policy, tmp_path):
    """Wrong answers in a run with ``none``, the majority in one with ``median_mad``: absent, and with the pass told."""

    def run(name, method, **options):
        return one_step(tiny_policy, tmp_path / name, quarter, normalization=method, **options)

    def quarter(completion_ids, **kwargs):
        return [float(len(ids) % 4 == 0) for ids in completion_ids]

    _, bare = run("bare", method)
    now, log = run("known", method, what_if_dead=True)
    assert "what_if/std/cos" not in bare
    assert_what_if(log, "std", run("std", "std")[0], now)
    assert math.isfinite(log["noise/within"]) and "noise/within" not in bare


def test_training_is_the_same_to_the_last_bit(tiny_policy, tmp_path):
    """Parameters, logs and random numbers, also with dropout, over several steps and micro-batches."""
    options = {**PLAIN, "learning_rate": 0.05, "interference_dim": 16, "interference_every": 2, "max_steps": 4}
    options |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    drawn, trainers = [], []
    for dead in (False, True):
        options |= {"what_if_dead": dead, "peft_config": lora(lora_dropout=0.5)}
        trainers.append(train(tiny_policy, tmp_path / str(dead), half_dead, **options))
        drawn.append(torch.rand(4))
    plain, scored = trainers
    assert torch.equal(*drawn)
    torch.testing.assert_close(parameters(plain.model), parameters(scored.model), rtol=0, atol=0)
    for a, b in zip(plain.recorder.logs, scored.recorder.logs, strict=True):
        for name in a:
            if name.startswith("what_if/"):  # of more normalisations at once: products of matrices of other sizes
                assert a[name] == pytest.approx(b.get(name), rel=1e-9), name
            elif not any(word in name for word in (*TIMINGS, "sec", "time")):
                assert a[name] == b.get(name), name


def test_the_file_and_the_command(tiny_policy, tmp_path, capsys):
    train(tiny_policy, tmp_path, half_dead, **SCORED)
    record = next(one for one in read_interference(tmp_path) if one.scores_BB is not None)
    beside = record.score_advantage_B != record.advantage_B
    assert (
        beside.any() and (record.coefficient_B[beside] == 0).all() and (record.score_coefficient_B[beside] != 0).all()
    )
    assert (record.gram_BB[beside] == 0).all() and (record.scores_BB.diagonal()[beside] > 0).all()
    assert (record.gram_BB[~beside][:, ~beside] == record.scores_BB[~beside][:, ~beside]).all()
    what_if_command([str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"\n{method} " in printed for method in HIDDEN) and "without a score" not in printed


@pytest.mark.parametrize("why", ["reentrant", "failure"])
def test_a_pass_that_fails_is_the_last(why, tiny_policy, tmp_path, monkeypatch, caplog):
    options = dict(SCORED)
    if why == "reentrant":
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    else:
        monkeypatch.setattr(CurvatureGRPOTrainer, "_score_with_graph", lambda self, batch: 1 / 0)
    trainer = train(tiny_policy, tmp_path, half_dead, **options)
    (said,) = messages(caplog, "what_if_dead=True")
    assert ("use_reentrant" if why == "reentrant" else "ZeroDivisionError") in said
    logs = logged(trainer)
    assert len(logs) == 3 and all("interference/live_prompts" in entry for entry in logs)
    with_dead = [entry for entry in logs if entry["normalization/zero_variance_frac"] > 0]
    assert with_dead and not any("what_if/batch_mean/cos" in entry for entry in with_dead)
    assert any("what_if/mean/cos" in entry for entry in logs)


def test_off_policy_nothing_is_scored(tiny_policy, tmp_path, monkeypatch):
    def never(self, batch):
        raise AssertionError("a pass was made")

    monkeypatch.setattr(CurvatureGRPOTrainer, "_score_with_graph", never)
    train(tiny_policy, tmp_path, half_dead, interference_every=1, what_if_dead=True, beta=0.1)


def test_two_processes(tiny_policy, tmp_path):
    """Each scores its own sequences and knows its own prompts' tasks alone: both log what one process logs with the
    same rollouts, and training is what it is without."""
    options = {"interference_every": 1, "interference_dim": 0, "loss_type": "grpo", "dead": 0.5, "learning_rate": 0.01}
    one = run_processes(1, tiny_policy, tmp_path / "one", what_if_dead=True, **options)[0]
    two = run_processes(2, tiny_policy, tmp_path / "two", what_if_dead=True, **options)
    without = run_processes(2, tiny_policy, tmp_path / "without", **options)
    records = [read_interference(tmp_path / name) for name in ("two", "one")]
    assert len(records[0]) == len(records[1]) == 3
    for ours, theirs in zip(*records, strict=True):
        assert ours.task_P == theirs.task_P and set(ours.task_P) <= {"down", "up"}
    told = [name for log in one["logs"] for name in log if name.startswith("what_if/global/")]
    assert len(told) >= 3 and not any("what_if/global/cos" in log for log in without[0]["logs"])
    for rank, prefixes in ((0, ("what_if/", "noise/", "tasks/")), (1, ("tasks/",))):
        for log, expected in zip(two[rank]["logs"], one["logs"], strict=True):
            names = [name for name in expected if name.startswith(prefixes) and (rank == 0 or "reward" in log)]
            assert len(names) >= 8 * ("reward" in log)
            for name in names:
                assert log[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    for other in (two[1], without[0]):
        torch.testing.assert_close(two[0]["parameters"], other["parameters"], rtol=0, atol=0)
