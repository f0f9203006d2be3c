"""Sequences without a gradient aren't run, the others are regrouped: the same gradient, and the same metrics, for less."""

import json
import logging
import zlib

import pytest
import torch
from allpairspy import AllPairs
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from test_fused_trainer import TINY, tool_rollout
from test_trainer_equality import PLAIN, Recorder, assert_same, digits, prompts, run
from test_two_processes import assert_same_run
from test_two_processes import run as run_processes
from transformers import AutoConfig, AutoTokenizer, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig
from transformers.models.auto import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.batch_rows import even_batches, join, select
from trl_ext.micro_batches import NOTHING, StepCounts, compute_metrics
from trl_ext.skipping import has_dropout, trimmed_columns, what_runs

OPTIONS = {
    "loss_type": ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"],
    "beta": [0.0, 0.05],
    "num_iterations": [1, 2],
    # (gradient accumulation, steps per generation)
    "accumulation": [(4, 4), (2, 4), (4, 2), (1, 1)],
    "lora": [False, True],
    "dead": ["most", "all", "none"],
    "pad_to_multiple_of": [None, 8],
}
DESIGN = [
    dict(zip(OPTIONS, row, strict=True))
    for row in AllPairs(list(OPTIONS.values()), filter_func=lambda row: len(row) < 6 or row[5] != "all" or row[1] == 0)
]


def dead_share(prompt, share):
    return zlib.crc32(prompt[0]["content"].encode()) % 100 < 100 * share


def reward_with_dead(share):
    """As ``digits``, but of equal rewards for this share of the prompts; 0.25 and 1 have an exact mean."""

    def reward(completions, prompts, **kwargs):
        values = digits(completions)
        return [0.25 if dead_share(p, share) else v for p, v in zip(prompts, values, strict=True)]

    return reward


SHARES = {"most": 0.7, "all": 1.0, "none": 0.0}


@pytest.fixture
def passes(monkeypatch):
    """(sequences, columns) of each forward with a gradient through the backbone."""
    seen = []
    forward = torch.nn.Embedding.forward

    def spy(self, ids):
        if torch.is_grad_enabled() and ids.dim() == 2:
            seen.append(tuple(ids.shape))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", spy)
    return seen


def train(trainer_class, config_class, policy, folder, setting, **extra):
    setting = {**PLAIN, **{name: value for name, value in setting.items() if name in PLAIN}}
    return run(trainer_class, config_class, policy, folder, setting, per_device_train_batch_size=4, **extra)


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_gradient_for_less(setting, passes, tiny_policy, tmp_path):
    extra = {"reward": reward_with_dead(SHARES[setting["dead"]]), "pad_to_multiple_of": setting["pad_to_multiple_of"]}
    theirs = train(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", setting, **extra)
    full = sum(rows * columns for rows, columns in passes)
    passes.clear()
    ours = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", setting, **extra)
    assert_same(ours, theirs, small_kl=setting["beta"] > 0)
    run_here = sum(rows * columns for rows, columns in passes)
    alive = [any(g.abs().sum() > 0 for g in step.values()) for step in theirs[1].gradients]
    assert any(alive) == (setting["dead"] != "all")
    logs = [log for log in ours[1].logs if "compute/tokens_run" in log]
    if setting["loss_type"] == "vespo":
        assert run_here == full and not logs
    elif setting["beta"] == 0 and setting["dead"] != "none":
        assert run_here < 0.8 * full
        assert all(log["compute/sequences_skipped_frac"] > 0 for log in logs if setting["dead"] == "all")
    else:
        assert run_here <= full
    if logs and setting["accumulation"] == (4, 4):  # what is logged is what was run
        assert run_here / full == pytest.approx(1 - sum(l["compute/flops_saved_frac"] for l in logs) / len(logs), rel=0.1)
