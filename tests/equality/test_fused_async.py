"""The fused head of TRL's AsyncGRPOTrainer: gradients, losses and logs are TRL's own."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from harness import OURS, lora, tokenizer_of
from processes import start
from tiny_models import HEADS, save_model
from trl import GRPOTrainer

from trl_ext import attach, fuse_head, fused_async, read_interference
from trl_ext.compat import ChangedTRL
from trl_ext.head.forward import LogProbsOutput

pytest.importorskip("trl.experimental.async_grpo.packing", reason="this TRL has no AsyncGRPOTrainer that packs tries")

from attach_async_worker import FSDP2, build, count_rows, made_samples, micro_batches, one_backward_for_each_group, run
from trl.experimental.async_grpo import AsyncGRPOTrainer, async_grpo_trainer

OFF_POLICY = {"epsilon": 0.05, "epsilon_high": 0.07}  # the old log-probs are 0.1 away


@pytest.fixture
def samples(tiny_policy):
    return made_samples(tokenizer_of(tiny_policy), 12)


def recorded(trainer):
    """Trains; returns the loss and the gradients of each micro-batch, and what TRL logs."""
    found, step = [], trainer.training_step

    def keep(model, inputs, *args):
        before = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        loss = step(model, inputs, *args)
        named = [(name, one.grad) for name, one in model.named_parameters() if one.grad is not None]
        found.append((loss, {name: grad - before.get(name, 0) for name, grad in named}))
        return loss

    trainer.training_step = keep
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio" in log]
    return found, [{name: v for name, v in log.items() if not name.startswith(("perf/", *OURS))} for log in logs]


def assert_equal(ours, trls, rtol=1e-5):
    """Losses and gradients of all micro-batches, and every logged value."""
    assert len(ours[0]) == len(trls[0]) > 0 and len(ours[1]) == len(trls[1]) > 0
    for (loss, gradients), (loss_of_trl, gradients_of_trl) in zip(ours[0], trls[0], strict=True):
        torch.testing.assert_close(loss, loss_of_trl, rtol=rtol, atol=rtol)
        assert gradients.keys() == gradients_of_trl.keys()
        for name, expected in gradients_of_trl.items():
            error, size = (gradients[name] - expected).norm(), expected.norm()
            assert error <= rtol * size + 1e-12, (name, error, size)
    for log, log_of_trl in zip(ours[1], trls[1], strict=True):
        assert log == pytest.approx(log_of_trl, rel=max(rtol, 1e-6), abs=1e-6, nan_ok=True)


def both(policy, folder, samples, peft_config=None, **options):
    """(losses, gradients, logs) of ours and of TRL's, and our trainer."""
    fused = build(policy, folder / "fused", samples, peft_config, **options)
    fuse_head(fused)
    plain = build(policy, folder / "plain", samples, peft_config, **options)
    return recorded(fused), recorded(plain), fused


@pytest.fixture
def rows(monkeypatch):
    """The rows that each kernel got."""
    return count_rows(monkeypatch.setattr)


@pytest.fixture
def fused_always(monkeypatch):
    """Rows whose samples share many trained tokens aren't left to ``linear_logprob``."""
    monkeypatch.setattr(fused_async, "tokens_a_position", lambda model: torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_budget": 80},
        {"temperature": 0.7},
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.nightly),
        {"bf16": True},
    ],
)
def test_gradients_losses_and_logs_are_trls(options, samples, tiny_policy, tmp_path, rows, fused_always, caplog):
    ours, trls, _ = both(tiny_policy, tmp_path, samples, **OFF_POLICY, **options)
    assert_equal(ours, trls, rtol=2e-2 if "bf16" in options else 1e-5)
    assert all(ours[1][0][name] > 0.05 for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"))
    tokens = ours[1][0]["batch/trained_tokens_per_step"]
    assert rows == {"linear_grpo_loss": tokens}
    assert "linear_logprob" not in caplog.text


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_positions_of_many_tokens_are_one_row(adapter, samples, tiny_policy, tmp_path, rows):
    """In the first micro-batch every group has two equal samples; in the second, two samples share one position."""
    rng, size = np.random.default_rng(1), len(tokenizer_of(tiny_policy))
    for place, sample in enumerate(samples[8:]):
        answer = sample.completion_mask.nonzero()[0]
        sample.input_ids[answer] = rng.integers(4, size, len(answer))
        sample.input_ids[answer[0]] = 4 + max(place, 1)
    peft_config = lora(init_lora_weights=False) if adapter else None
    ours, trls, _ = both(tiny_policy, tmp_path, samples, peft_config, **OFF_POLICY)
    assert_equal(ours, trls)
    # with a frozen head the loss kernel saves no products
    assert set(rows) == ({"linear_logprob"} if adapter else {"linear_grpo_loss", "linear_logprob"})
    assert rows.total() < ours[1][0]["batch/trained_tokens_per_step"]


class PlainLogits:
    """Takes the model's place in TRL's loss: log-probs of its own logits, without any fused head."""

    def __init__(self, model):
        self.model = model

    def __call__(self, shift_labels, fused_lm_head, **kwargs):
        logprobs = self.model(**kwargs).logits.log_softmax(-1)
        chosen = logprobs.gather(-1, shift_labels.clamp(min=0)[..., None])[..., 0]
        return LogProbsOutput(chosen, -(logprobs.exp() * logprobs).sum(-1))


def test_gradients_are_those_of_plain_logits_in_float64(samples, tiny_policy, tmp_path, rows, fused_always):
    """TRL's own head computes in float32."""
    trainer = build(tiny_policy, tmp_path, samples, learning_rate=0.0, **OFF_POLICY)
    batches = micro_batches(trainer)
    trainer.model.double()
    gradients = []
    for model in (PlainLogits(trainer.model), trainer.model):
        for batch in batches:
            trainer.compute_loss(model, batch).backward()
        gradients.append({name: one.grad.clone() for name, one in trainer.model.named_parameters()})
        trainer.model.zero_grad()
        if model is not trainer.model:
            fuse_head(trainer)
    assert set(rows) == {"linear_grpo_loss"}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_several_steps_of_training_are_trls(adapter, tiny_policy, tmp_path, fused_always):
    samples = made_samples(tokenizer_of(tiny_policy), 24)
    peft_config = lora(init_lora_weights=False) if adapter else None
    ours, trls, trainer = both(tiny_policy, tmp_path, samples, peft_config, **OFF_POLICY, max_steps=4)
    assert len(ours[0]) == 8 and len(ours[1]) == 4
    assert_equal(ours, trls, rtol=1e-4)
    assert (len(ours[0][0][1]) < len(list(trainer.model.parameters()))) is adapter


@pytest.mark.parametrize("head", HEADS)
def test_heads_that_change_their_logits_and_mixtures_of_experts(head, tiny_policy, tmp_path, fused_always):
    config = copy.deepcopy(HEADS[head])
    if head == "softcap":  # the attention in place of flash attention has neither windows nor a cap
        config.layer_types, config.attn_logit_softcapping = ["full_attention"] * config.num_hidden_layers, None
    # TRL reads these to count operations
    config.moe_intermediate_size, config.decoder_sparse_step, config.mlp_only_layers = 48, 1, []
    policy = save_model(config, tiny_policy, tmp_path / "policy")
    samples = made_samples(tokenizer_of(tiny_policy), 12)
    ours, trls, trainer = both(policy, tmp_path, samples, **OFF_POLICY)
    assert trainer.aux_loss_enabled is (head == "mixture of experts")
    assert ("aux_loss" in ours[1][0]) is trainer.aux_loss_enabled
    assert_equal(ours, trls, rtol=3e-5)


def test_without_gradients_the_loss_is_trls(samples, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, samples, learning_rate=0.0)
    fuse_head(trainer)
    batch = micro_batches(trainer)[0]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, AsyncGRPOTrainer.compute_loss(trainer, trainer.model, batch))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_loss_that_is_not_finite_spoils_the_gradients_as_trls_does(
    value, samples, tiny_policy, tmp_path, rows, fused_always
):
    trainer = build(tiny_policy, tmp_path, samples, learning_rate=0.0)
    fuse_head(trainer)
    batch = micro_batches(trainer)[0]
    batch["old_log_probs"][0, 1], batch["advantages"][0, 1] = value, -1
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    with torch.no_grad():
        expected = AsyncGRPOTrainer.compute_loss(trainer, trainer.model, batch)
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    assert not loss.isfinite() and rows["linear_grpo_loss"]
    assert not any(one.grad.isfinite().all() for one in trainer.model.parameters())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_with_trls_head(engine, tiny_policy, tmp_path):
    for name in ("plain", "fused"):
        arguments = (str(tiny_policy), str(tmp_path / name), False, engine == "fsdp2", name == "fused")
        started = start(2, run, *arguments, folder=tmp_path / name, **(FSDP2 if engine == "fsdp2" else {}))
        assert started.finish() == [0, 0], started.text()[-3000:]
    kernels = dict(re.findall(r"rank (\d): ({.*?})", started.text()))
    assert "linear_logprob" in kernels["1"] and "linear_logprob" not in kernels["0"]  # ranks may differ
    weights = [torch.load(tmp_path / name / "weights.pt") for name in ("fused", "plain")]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_attach_records_the_head(adapter, samples, tiny_policy, tmp_path, caplog):
    peft_config = lora(init_lora_weights=False) if adapter else None
    trainer = build(tiny_policy, tmp_path, samples, peft_config, learning_rate=0.0)
    undo = fuse_head(trainer)
    attached = attach(trainer, every=1, dim=0)
    batches = micro_batches(trainer)
    (record,) = read_interference(tmp_path)
    metrics = attached.recorder.metrics()
    assert metrics["interference/coverage"] == pytest.approx(1)
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
    assert "doesn't record" not in caplog.text and "excludes" not in caplog.text
    with pytest.raises(ValueError, match=r"call its detach\(\) first"):
        undo()
    attached.detach()
    undo()
    expected = one_backward_for_each_group(trainer, batches, samples, record.prompt_key_P.tolist(), ())
    assert np.linalg.norm(record.gram_PP - expected) <= 1e-4 * np.linalg.norm(expected)


def test_attached_and_fused_on_two_processes(tiny_policy, tmp_path):
    arguments = (str(tiny_policy), str(tmp_path), True, True, True)
    started = start(2, run, *arguments, folder=tmp_path, **FSDP2)
    assert started.finish() == [0, 0], started.text()[-3000:]
    for record in read_interference(tmp_path):
        assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
        assert record.metrics["interference/coverage"] == pytest.approx(1)


class WithoutClipping:
    """torch, in a TRL whose loss isn't clipped."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def min(self, first, second):
        return first


def test_another_loss_keeps_its_gradients(samples, tiny_policy, tmp_path, rows, monkeypatch, caplog):
    monkeypatch.setattr(async_grpo_trainer, "torch", WithoutClipping())
    ours, trls, _ = both(tiny_policy, tmp_path, samples, **OFF_POLICY)
    assert_equal(ours, trls)
    assert set(rows) == {"linear_logprob"}
    assert caplog.text.count("isn't the one that linear_grpo_loss computes") == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_undo_restores_trls_head(bf16, tiny_policy, tmp_path, rows):
    """With bf16, accelerate wraps the forward while training."""
    samples = made_samples(tokenizer_of(tiny_policy), 36)
    trainer, plain = (build(tiny_policy, tmp_path, samples, learning_rate=0.0, bf16=bf16) for _ in range(2))
    before = set(vars(trainer))
    undo = fuse_head(trainer)
    trainer.train()
    undo()
    undo()
    assert "compute_loss" not in vars(trainer) and "_fused_head" not in vars(trainer) and before <= set(vars(trainer))
    rows.clear()
    batch = micro_batches(plain)[0]
    with torch.no_grad():
        losses = [one.compute_loss(one.model, batch) for one in (trainer, plain)]
    assert losses[0] == losses[1] and not rows
    fuse_head(trainer)


class Own(AsyncGRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs)


def test_refusals(samples, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, samples)
    attached = attach(trainer)
    with pytest.raises(ValueError, match="call fuse_head before attach"):
        fuse_head(trainer)
    attached.detach()
    fuse_head(trainer)
    with pytest.raises(ValueError, match="is fused already"):
        fuse_head(trainer)
    other = build(tiny_policy, tmp_path, samples)
    other.__class__ = Own
    with pytest.raises(ValueError, match="Own has its own compute_loss"):
        fuse_head(other)
    other.__class__ = AsyncGRPOTrainer
    del other.epsilon_low
    with pytest.raises(ChangedTRL, match="AsyncGRPOTrainer has no epsilon_low"):
        fuse_head(other)
    other.accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="doesn't work with DeepSpeed"):
        fuse_head(other)
    with pytest.raises(ValueError, match="AsyncGRPOTrainer, not with GRPOTrainer; for GRPOTrainer, CurvatureGRPO"):
        fuse_head(object.__new__(GRPOTrainer))
