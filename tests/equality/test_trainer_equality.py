"""CurvatureGRPOTrainer against TRL's GRPOTrainer: same seed, same rollouts, real trainer, real (small) model.

A pairwise design: every two settings of any two options occur together in at least one run. Each run trains both
trainers for a few SGD steps and compares advantages, losses, gradients, logged metrics and parameters.
"""

import json

import pytest
from allpairspy import AllPairs
from harness import EVALUATED, PLAIN, assert_same, digits, short, train, train_both
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOTrainer

OPTIONS = {
    "loss_type": ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"],
    "beta": [0.0, 0.05],
    "num_iterations": [1, 2],
    # (gradient accumulation, steps per generation)
    "accumulation": [(1, 1), (2, 4), (4, 2)],
    "lora": [False, True],
    "rewards": ["one", "several"],
    "aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "scale_rewards": ["group", "batch", "none"],
    "evaluation": [False, True],
    "fused_loss": [True, False],
    "skip_zero_advantage": [True, False],
    "share_prompts": [False, True],
}
DESIGN = [dict(zip(OPTIONS, row, strict=True)) for row in AllPairs(list(OPTIONS.values()))]


LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


def options_of(setting):
    """(reward functions, options) of a row of the design."""
    names = ("loss_type", "beta", "num_iterations", "scale_rewards", "fused_loss", "skip_zero_advantage")
    accumulation, per_generation = setting["accumulation"]
    several = setting["rewards"] == "several"
    options = {
        "share_prompts": setting["share_prompts"],
        "multi_objective_aggregation": setting["aggregation"],
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_generation,
        "reward_weights": [0.75, 0.5] if several else None,
        "peft_config": LORA if setting["lora"] else None,
        **(EVALUATED if setting["evaluation"] else {}),
        **{name: setting[name] for name in names},
    }
    return [digits, short] if several else digits, {**PLAIN, **options}


def test_the_design_is_pairwise_and_small():
    assert len(DESIGN) <= 30
    assert {row["loss_type"] for row in DESIGN} == set(OPTIONS["loss_type"])
    names = list(OPTIONS)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            pairs = {(str(row[first]), str(row[second])) for row in DESIGN}
            assert len(pairs) == len(OPTIONS[first]) * len(OPTIONS[second]), (first, second)


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_as_trl(setting, tiny_policy, tmp_path):
    rewards, options = options_of(setting)
    _, theirs = train_both(tiny_policy, tmp_path, rewards, **options)
    logs = theirs.recorder.logs
    assert sum(log.get("grad_norm", 0) > 0 for log in logs) >= 2, "nothing was trained, so nothing was compared"
    assert any(log.get("completions/max_length", 0) > log.get("completions/min_length", 0) for log in logs)


def test_a_plain_grpo_config_does_as_well(tiny_policy, tmp_path):
    train_both(tiny_policy, tmp_path, config_class=GRPOConfig, **PLAIN)


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_from_a_checkpoint(lora, tiny_policy, tmp_path):
    """Both go on from TRL's checkpoint, and ours from ours ends where TRL's does."""
    options = {
        **PLAIN,
        **EVALUATED,
        "peft_config": LORA if lora else None,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
    }
    resumed = []
    for trainer_class in (CurvatureGRPOTrainer, GRPOTrainer):
        folder = tmp_path / trainer_class.__name__
        options = {**options, "trainer_class": trainer_class}
        train(tiny_policy, folder, **{**options, "max_steps": 2}, save_strategy="steps", save_steps=2)
        resumed.append(train(tiny_policy, folder, **{**options, "max_steps": 4}, resume=str(folder / "checkpoint-2")))
    assert_same(*resumed)
    assert resumed[0].state.global_step == 4
    folder = tmp_path / "CurvatureGRPOTrainer"
    card = (folder / "README.md").read_text()
    assert "Curvature-aware GRPO" in card and "2601.23135" in card and "curvature-grpo" in card
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("normalization/zero_variance_frac" in log for log in state["log_history"])
