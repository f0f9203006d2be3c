"""CurvatureGRPOTrainer against TRL's GRPOTrainer: same seed, same rollouts, real trainer, real (small) model.

A pairwise design: every two settings of any two options occur together in at least one run. Each run trains both
trainers for a few SGD steps and compares advantages, losses, gradients, logged metrics, parameters, and how much of
the batch went through the model.
"""

import json
import re
from itertools import combinations

import pytest
from allpairspy import AllPairs
from harness import EVALUATED, PLAIN, assert_same, logged, lora, reward_with_dead, short, train, train_both
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOTrainer

OPTIONS = {
    "loss_type": ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"],
    # (gradient accumulation, steps per generation)
    "accumulation": [(1, 1), (2, 4), (4, 2), (4, 4)],
    "dead": ["none", "most", "all"],
    "beta": [0.0, 0.05],
    "num_iterations": [1, 2],
    "lora": [False, True],
    "rewards": ["one", "several"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "scale_rewards": ["group", "batch", "none"],
    "pad_to_multiple_of": [None, 8],
    "evaluation": [False, True],
    "fused_loss": [True, False],
    "skip_zero_advantage": [True, False],
    "share_prompts": [False, True],
}
SHARES = {"none": 0.0, "most": 0.7, "all": 1.0}
NOT_OPTIONS = ("accumulation", "dead", "lora", "rewards", "evaluation")


def comparable(row):
    """With KL and without a reward's gradient, gradients are rounding."""
    setting = dict(zip(OPTIONS, row, strict=False))
    return setting.get("dead") != "all" or setting.get("beta", 0.0) == 0.0


DESIGN = [dict(zip(OPTIONS, row, strict=True)) for row in AllPairs(list(OPTIONS.values()), filter_func=comparable)]


def options_of(setting):
    """(reward functions, options) of a row of the design."""
    reward, several = reward_with_dead(SHARES[setting["dead"]]), setting["rewards"] == "several"
    options = {name: value for name, value in setting.items() if name not in NOT_OPTIONS}
    options["gradient_accumulation_steps"], options["steps_per_generation"] = setting["accumulation"]
    options |= {"reward_weights": [0.75, 0.5] if several else None, "peft_config": lora() if setting["lora"] else None}
    options |= EVALUATED if setting["evaluation"] else {}
    return [reward, short] if several else reward, {**PLAIN, **options}


def test_the_design_is_pairwise_and_small():
    assert len(DESIGN) <= 40
    for first, second in combinations(OPTIONS, 2):
        pairs = {(str(row[first]), str(row[second])) for row in DESIGN}
        left_out = {first, second} == {"dead", "beta"}
        assert len(pairs) == len(OPTIONS[first]) * len(OPTIONS[second]) - left_out, (first, second)


def positions(passes):
    return sum(rows * columns for rows, columns in passes)


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_as_trl(setting, passes, tiny_policy, tmp_path):
    rewards, options = options_of(setting)
    theirs = train(tiny_policy, tmp_path / "trl", rewards, trainer_class=GRPOTrainer, **options)
    full = positions(passes)
    passes.clear()
    ours = train(tiny_policy, tmp_path / "ours", rewards, **options)
    assert_same(ours, theirs, small_kl=setting["beta"] > 0 and setting["dead"] != "none")

    all_dead = setting["dead"] == "all" and setting["rewards"] == "one"
    steps = [log["grad_norm"] > 0 for log in logged(theirs, "grad_norm")]
    assert not any(steps) if all_dead else sum(steps) >= 2, "nothing was trained, so nothing was compared"
    assert any(
        log.get("completions/max_length", 0) > log.get("completions/min_length", 0) for log in theirs.recorder.logs
    )
    check_work_saved(setting, positions(passes) / full, logged(ours, "compute/tokens_run"))


def check_work_saved(setting, share_run, logs):
    """``share_run``: of the positions that TRL runs. What is logged is what was run."""
    shares = [value for log in logs for name, value in log.items() if re.fullmatch("compute/.*_frac", name)]
    assert all(0 <= share <= 1 for share in shares)
    skipping = setting["fused_loss"] and setting["skip_zero_advantage"] and setting["loss_type"] != "vespo"
    if not skipping:
        assert share_run == 1 and all(log["compute/flops_saved_frac"] == 0 for log in logs)
        return
    assert share_run <= 1
    if setting["rewards"] == "one" and setting["beta"] == 0 and setting["dead"] != "none":
        assert share_run < 0.8
        assert all(log["compute/sequences_skipped_frac"] > 0 for log in logs if setting["dead"] == "all")
    if setting["share_prompts"] and setting["dead"] != "all":
        assert logs[1]["compute/padding_removed_frac"] == 1 and logs[1]["compute/flops_saved_frac"] > 0.2
    elif logs and setting["accumulation"] == (4, 4):
        saved = sum(log["compute/flops_saved_frac"] for log in logs) / len(logs)
        assert share_run == pytest.approx(1 - saved, rel=0.1)


def test_a_plain_grpo_config_does_as_well(tiny_policy, tmp_path):
    train_both(tiny_policy, tmp_path, config_class=GRPOConfig, **PLAIN)


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
def test_resumed_from_a_checkpoint(adapter, tiny_policy, tmp_path):
    """Both go on from TRL's checkpoint, and ours from ours ends where TRL's does."""
    options = {**PLAIN, **EVALUATED, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    resumed = []
    for trainer_class in (CurvatureGRPOTrainer, GRPOTrainer):
        folder = tmp_path / trainer_class.__name__
        options |= {"trainer_class": trainer_class, "peft_config": adapter}
        train(tiny_policy, folder, **{**options, "max_steps": 2}, save_strategy="steps", save_steps=2)
        resumed.append(train(tiny_policy, folder, **{**options, "max_steps": 4}, resume=str(folder / "checkpoint-2")))
    assert_same(*resumed)
    assert resumed[0].state.global_step == 4
    folder = tmp_path / "CurvatureGRPOTrainer"
    card = (folder / "README.md").read_text()
    assert "Curvature-aware GRPO" in card and "2601.23135" in card and "curvature-grpo" in card
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("normalization/zero_variance_frac" in log for log in state["log_history"])
