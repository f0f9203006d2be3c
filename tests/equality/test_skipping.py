"""Sequences without a gradient don't run, the others are regrouped: the same gradient and metrics, for less."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from harness import (
    FOUR,
    PLAIN,
    assert_same,
    assert_same_gradients,
    build,
    logged,
    lora,
    messages,
    reward_with_dead,
    tool_rollout,
    train,
    train_both,
)
from tiny_models import save_model
from transformers import GPT2Config, TrainerCallback
from trl import GRPOTrainer
from two_process_worker import assert_same_run, run_processes

from trl_ext.compat import read_loss_settings
from trl_ext.options import read_options
from trl_ext.plan import micro_batches
from trl_ext.plan.rules import decide_regrouping
from trl_ext.schema import Sequences

APART = {**PLAIN, **FOUR}  # and no prompt shared, as with TRL


def test_images_and_advantages_of_tokens_stay_where_they_are(tiny_policy, tmp_path):
    def runs(**batch):
        return decide_regrouping(read_options(trainer.args), read_loss_settings(trainer), Sequences(batch), None)

    trainer = build(tiny_policy, tmp_path)
    images = runs(advantages=torch.zeros(4), pixel_values=torch.zeros(4, 3))
    assert not images.regrouped and "images" in images.why
    assert "tokens of a sequence have different advantages" in runs(advantages=torch.zeros(4, 5)).why
    trainer = build(tiny_policy, tmp_path, importance_sampling_level="sequence")
    assert runs(advantages=torch.zeros(4)).skipped
    assert "off policy" in runs(advantages=torch.zeros(4), old_per_token_logps=torch.zeros(4, 5)).why


def test_learned_positions(tiny_policy, tmp_path):
    """GPT-2: a prompt's columns stay, or its positions would change; the gradient is TRL's."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    folder = save_model(config, tiny_policy, tmp_path / "model")
    ours, _ = train_both(folder, tmp_path, reward_with_dead(0.4), **APART, num_iterations=2)
    assert any(log.get("compute/sequences_skipped_frac", 0) > 0 for log in ours.recorder.logs)


# ---- the trainer


@pytest.mark.parametrize("adapter", [None, lora(lora_dropout=0.1)], ids=["full", "lora"])
def test_dropout_is_logged_once(adapter, tiny_policy, tmp_path, caplog):
    trainer = build(tiny_policy, tmp_path, peft_config=adapter, **FOUR)
    if adapter is None:
        trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    trainer.train()
    assert len(messages(caplog, "dropout")) == 1


def test_tool_output_and_dead_groups(passes, tiny_policy, tmp_path):
    options = {**FOUR, "num_iterations": 2, "learning_rate": 0.05, "max_steps": 4, "generation_kwargs": None}
    train_both(tiny_policy, tmp_path, reward_with_dead(0.5), rollout_func=tool_rollout, **options)
    assert sum(rows for rows, _ in passes) < 2 * 4 * 16  # TRL's and ours


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


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_an_engine_that_counts_every_backward(share, passes, tiny_policy, tmp_path, monkeypatch):
    """DeepSpeed (made up): all four micro-batches run, with fewer sequences in each; the gradient is TRL's."""
    theirs = train(tiny_policy, tmp_path / "trl", reward_with_dead(share), trainer_class=GRPOTrainer, **APART)
    passes.clear()
    monkeypatch.setattr(micro_batches, "DistributedType", SimpleNamespace(DEEPSPEED=DistributedType.NO))
    assert_same(train(tiny_policy, tmp_path / "ours", reward_with_dead(share), **APART), theirs)
    assert len(passes) == 3 * 4 and sum(rows for rows, _ in passes) < 3 * 16


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
