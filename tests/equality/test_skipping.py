"""Sequences without a gradient don't run, the others are regrouped: the same gradient and metrics, for less."""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from allpairspy import AllPairs
from harness import (
    PLAIN,
    assert_same,
    assert_same_gradients,
    build,
    logged,
    messages,
    reward_with_dead,
    tool_rollout,
    train,
    train_both,
)
from peft import LoraConfig
from tiny_models import HEADS, save_model
from transformers import GPT2Config, TrainerCallback
from trl import GRPOTrainer
from two_process_worker import assert_same_run, run_processes

from trl_ext import CurvatureGRPOTrainer
from trl_ext.plan import micro_batches
from trl_ext.plan.micro_batches import KEY
from trl_ext.schema import Sequences

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


SHARES = {"most": 0.7, "all": 1.0, "none": 0.0}
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
# an optimizer step of 16 sequences in four micro-batches
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
APART = {**PLAIN, **FOUR}  # and no prompt shared, as with TRL


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_gradient_for_less(setting, passes, tiny_policy, tmp_path):
    names = ("loss_type", "beta", "num_iterations", "pad_to_multiple_of")
    accumulation, per_generation = setting["accumulation"]
    options = {**APART, **{name: setting[name] for name in names}, "steps_per_generation": per_generation}
    options |= {"gradient_accumulation_steps": accumulation, "peft_config": LORA if setting["lora"] else None}
    reward = reward_with_dead(SHARES[setting["dead"]])
    theirs = train(tiny_policy, tmp_path / "trl", reward, trainer_class=GRPOTrainer, **options)
    full = sum(rows * columns for rows, columns in passes)
    passes.clear()
    ours = train(tiny_policy, tmp_path / "ours", reward, **options)
    assert_same(ours, theirs, small_kl=setting["beta"] > 0)
    run_here = sum(rows * columns for rows, columns in passes)
    alive = [any(g.abs().sum() > 0 for g in step.values()) for step in theirs.recorder.gradients]
    assert any(alive) == (setting["dead"] != "all")
    logs = logged(ours, "compute/tokens_run")
    if setting["loss_type"] == "vespo":
        assert run_here == full and all(log["compute/flops_saved_frac"] == 0 for log in logs)
    elif setting["beta"] == 0 and setting["dead"] != "none":
        assert run_here < 0.8 * full
        assert all(log["compute/sequences_skipped_frac"] > 0 for log in logs if setting["dead"] == "all")
    else:
        assert run_here <= full
    if logs and setting["accumulation"] == (4, 4):  # what is logged is what was run
        saved = sum(log["compute/flops_saved_frac"] for log in logs) / len(logs)
        assert run_here / full == pytest.approx(1 - saved, rel=0.1)


# ---- which case applies, and why


def override(name):
    """A subclass that overrides this method, and changes nothing."""

    def method(self, *arguments, **named):
        return getattr(CurvatureGRPOTrainer, name)(self, *arguments, **named)

    return type("Own", (CurvatureGRPOTrainer,), {name: method})


# options -> micro-batches regrouped, sequences skipped, and why
CASES = {
    "skipped": ({}, True, True, "sequences of advantage 0 don't run"),
    "asked for": ({"skip_zero_advantage": False}, False, False, "skip_zero_advantage=False"),
    "TRL's head": ({"fused_loss": False}, False, False, "fused_loss=False"),
    "KL": ({"beta": 0.1}, True, False, "every sequence runs: beta=0.1"),
    "whole sequences": ({"loss_type": "vespo"}, False, False, "loss_type='vespo' weighs whole sequences"),
    "entropy quantile": ({"top_entropy_quantile": 0.5}, False, False, "top_entropy_quantile=0.5 depends on the ent"),
    "entropy bonus": ({"entropy_coef": 0.1}, False, False, "the entropy bonus averages over a micro-batch"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5}, False, False, "off_policy_mask_threshold=0.5"),
    "its own loss": ({"trainer_class": override("_compute_loss")}, False, False, "Own overrides _compute_loss"),
    "its own inputs": (
        {"trainer_class": override("_prepare_inputs")},
        False,
        False,
        "Own overrides _prepare_inputs",
    ),
}


def runs_of(trainer, batch):
    parts = trainer._components
    return parts.micro_batches.decide_regrouping(Sequences(batch), parts.loss_settings(), parts.overrides().plan)


@pytest.mark.parametrize("name", CASES)
def test_which_case_applies_is_logged_once(name, tiny_policy, tmp_path, caplog):
    options, regrouped, skipped, why = CASES[name]
    with caplog.at_level(logging.INFO, logger="trl_ext.trainer"):
        trainer = train(tiny_policy, tmp_path, **FOUR, **options)
    runs = runs_of(trainer, {"advantages": torch.zeros(4)})
    assert (runs.regrouped, runs.skipped) == (regrouped, skipped) and why in runs.why
    others = ("in one pass", "Prompts aren't shared")
    (said,) = [one for one in caplog.records if why in one.message and not any(text in one.message for text in others)]
    asked_and_refused = options.get("skip_zero_advantage", True) and not skipped
    assert said.levelname == ("WARNING" if asked_and_refused else "INFO")


def test_images_and_advantages_of_tokens_stay_where_they_are(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, **FOUR)
    images = {"advantages": torch.zeros(4), "pixel_values": torch.zeros(4, 3)}
    assert not runs_of(trainer, images).regrouped and "images" in runs_of(trainer, images).why
    assert "single tokens" in runs_of(trainer, {"advantages": torch.zeros(4, 5)}).why
    sequence_level = build(tiny_policy, tmp_path, importance_sampling_level="sequence", **FOUR)
    assert runs_of(sequence_level, {"advantages": torch.zeros(4)}).skipped
    off_policy = {"advantages": torch.zeros(4), "old_per_token_logps": torch.zeros(4, 5)}
    assert "off policy" in runs_of(sequence_level, off_policy).why


def test_learned_positions(tiny_policy, tmp_path):
    """GPT-2: a prompt's columns stay, or its positions would change; the gradient is TRL's."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    folder = save_model(config, tiny_policy, tmp_path / "model")
    ours, _ = train_both(folder, tmp_path, reward_with_dead(0.4), **APART, num_iterations=2)
    assert any(log.get("compute/sequences_skipped_frac", 0) > 0 for log in ours.recorder.logs)


# ---- the trainer


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_is_logged_once(lora, tiny_policy, tmp_path, caplog):
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if lora else None
    trainer = build(tiny_policy, tmp_path, peft_config=adapter, **FOUR)
    if not lora:
        trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    with caplog.at_level(logging.WARNING, logger="trl_ext.trainer"):
        trainer.train()
    assert len(messages(caplog, "dropout")) == 1


def test_tool_output_and_dead_groups(passes, tiny_policy, tmp_path):
    options = {**FOUR, "num_iterations": 2, "learning_rate": 0.05, "max_steps": 4, "generation_kwargs": None}
    trained = []
    for trainer_class in (GRPOTrainer, CurvatureGRPOTrainer):
        options |= {"trainer_class": trainer_class, "rollout_func": tool_rollout}
        passes.clear()
        trained.append(train(tiny_policy, tmp_path, reward_with_dead(0.5), **options))
    assert_same(*trained[::-1])
    assert sum(rows for rows, _ in passes) < 4 * 16


def test_a_mixture_of_experts_with_its_auxiliary_loss(tiny_policy, tmp_path):
    folder = save_model(HEADS["mixture of experts"], tiny_policy, tmp_path / "model")
    ours, _ = train_both(folder, tmp_path, reward_with_dead(0.5), **APART)
    runs = runs_of(ours, {"advantages": torch.zeros(4)})
    assert not runs.regrouped and "auxiliary loss" in runs.why
    assert any(log.get("aux_loss", 0) > 0 for log in ours.recorder.logs)


def test_a_generation_with_one_live_group_runs_in_its_last_micro_batch(tiny_policy, tmp_path):
    """Of four calls one has work when a quarter is alive, and it is the last, which synchronises."""
    synchronised = []

    def one_live(completions, **kwargs):  # of the 16 rows of a generation, one group of four is alive
        return [0.5] * 12 + [0.0, 1.0, 1.0, 0.0]

    trainer = build(tiny_policy, tmp_path, one_live, **FOUR)
    step = trainer.training_step

    def watched(*args):  # put on the trainer: what a subclass does there would be between TRL's own micro-batches
        loss = step(*args)
        synchronised.append(trainer.accelerator.sync_gradients)
        return loss

    trainer.training_step = watched
    trainer.train()
    assert synchronised == [False, False, False, True] * 2
    for log in logged(trainer):
        assert log["compute/micro_batches"] == 1 and log["compute/sequences_skipped_frac"] == 0.75
    assert KEY not in trainer._buffered_inputs[0]


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_an_engine_that_counts_every_backward(share, passes, tiny_policy, tmp_path, monkeypatch):
    """DeepSpeed (made up): all four micro-batches run, with fewer sequences in each; the gradient is TRL's."""
    theirs = train(tiny_policy, tmp_path / "trl", reward_with_dead(share), trainer_class=GRPOTrainer, **APART)
    passes.clear()
    monkeypatch.setattr(micro_batches, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    assert_same(train(tiny_policy, tmp_path / "ours", reward_with_dead(share), **APART), theirs)
    assert len(passes) == 3 * 4 and sum(rows for rows, _ in passes) < 3 * 16


class OnlyTRLsKeys(CurvatureGRPOTrainer):
    """A subclass that makes the dict anew."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
        return {name: output[name] for name in names}


def test_a_subclass_that_returns_trls_keys_alone(tiny_policy, tmp_path):
    ends = [
        train(
            tiny_policy, tmp_path, reward_with_dead(0.6), trainer_class=OnlyTRLsKeys, skip_zero_advantage=skip, **FOUR
        )
        for skip in (True, False)
    ]
    assert_same_gradients(*(trainer.recorder.gradients for trainer in ends))


def test_a_step_that_broke_off_leaves_nothing(tiny_policy, tmp_path):
    """Stopped after two of four micro-batches and trained again: the gradients of skip_zero_advantage=False."""

    class Stop(TrainerCallback):
        substeps = 0

        def on_substep_end(self, args, state, control, **kwargs):
            self.substeps += 1
            control.should_training_stop |= self.substeps == 2

    gradients = []
    for skip in (False, True):
        options = {**FOUR, "skip_zero_advantage": skip, "learning_rate": 0.2, "callbacks": [Stop()]}
        trainer = build(tiny_policy, tmp_path / str(skip), reward_with_dead(0.5), **options)
        trainer.train()
        trainer.train()
        gradients.append(trainer.recorder.gradients)
    assert len(gradients[0]) >= 2
    assert_same_gradients(gradients[1], gradients[0], tolerance=1e-4)


# ---- two processes


@pytest.mark.parametrize("options", [{}, {"beta": 0.02, "num_iterations": 2}], ids=["DDP", "KL"])
def test_two_processes_with_different_live_counts(options, tiny_policy, tmp_path):
    """24 rows a process in four micro-batches, most groups dead, unevenly split: TRL's run, in fewer passes."""
    options = {**options, "gradient_accumulation_steps": 4, "steps_per_generation": 4, "max_steps": 4, "dead": 0.6}
    options["per_device_train_batch_size"] = 6
    theirs = run_processes(2, tiny_policy, tmp_path / "trl", trainer="trl", **options)
    ours = run_processes(2, tiny_policy, tmp_path / "ours", **options)
    assert_same_run(ours[0], theirs[0])
    for parameter, value in ours[0]["parameters"].items():
        assert torch.equal(value, ours[1]["parameters"][parameter])
    live = [rank["live_by_step"] for rank in ours]
    logs = [log for log in ours[0]["logs"] if "compute/micro_batches" in log]
    if not options.get("beta"):
        assert live[0] != live[1], "both had as much to do, so nothing was tried"
        assert any(log["compute/micro_batches"] < 4 for log in logs)


def test_a_step_of_ones_own_is_warned_of_with_its_cost(tiny_policy, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="trl_ext"):
        train(tiny_policy, tmp_path, trainer_class=override("training_step"), **FOUR)
    said = [one for one in caplog.records if "Own overrides training_step" in one.message]
    (said,) = [one for one in said if "Prompts aren't shared" not in one.message]
    assert said.levelname == "WARNING" and "2 to 5 times as long" in said.message
