"""A recorder attached to TRL's AsyncGRPOTrainer: against one backward for each prompt, and that training stays."""

from collections import Counter

import numpy as np
import pytest
import torch
from harness import OURS, lora, parameters, tokenizer_of
from processes import start

from trl_ext import attach, read_interference

pytest.importorskip("trl.experimental.async_grpo.packing", reason="this TRL has no AsyncGRPOTrainer that packs tries")

from attach_async_worker import FSDP2, build, made_samples, micro_batches, one_backward_for_each_group, run

HEAD = "model.embed_tokens.weight"  # tied to the head of the built-in policy
BUDGET = 80
ROWS = {"by number": {}, "by tokens": {"token_budget": BUDGET}}
COUNTS = ("microbatches_per_step", "samples_per_step", "trained_tokens_per_step", "forwarded_tokens_per_step")
LOGGED = ("loss", "ratio", "kl", "entropy", "clip_ratio/high_max", "reward", *(f"batch/{name}" for name in COUNTS))


@pytest.fixture
def samples(tiny_policy):
    return made_samples(tokenizer_of(tiny_policy), 12)


def forwarded(trainer):
    """The tokens of each forward that has a gradient, while the trainer trains."""
    tokens = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            tokens.append(kwargs["input_ids"].numel())

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    return tokens


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_prompts_gradients_are_those_of_one_backward_each(options, adapter, samples, tiny_policy, tmp_path, caplog):
    peft_config = lora(init_lora_weights=False) if adapter else None
    trainer = build(tiny_policy, tmp_path, samples, peft_config, learning_rate=0.0, **options)
    attached = attach(trainer, every=1, dim=0)
    tokens = forwarded(trainer)
    batches = micro_batches(trainer)
    assert len(batches) == 2 and len(tokens) > 2 and max(tokens) <= options.get("token_budget", 1000)
    (record,) = read_interference(tmp_path)
    text_of = {sample.group_id: sample.prompt[-1]["content"] for sample in samples}
    groups = record.prompt_key_P.tolist()
    assert record.prompt_text_P == [text_of[group] for group in groups]
    expected = one_backward_for_each_group(trainer, batches, samples, groups, () if adapter else (HEAD,))
    assert np.linalg.norm(record.gram_PP - expected) <= 1e-4 * np.linalg.norm(expected)
    assert len(groups) >= 3 and (np.diag(expected) > 0).all()
    metrics = attached.recorder.metrics()
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
    assert (f"tensors: {HEAD}." in caplog.text) is not adapter and "excludes" not in caplog.text
    coverage = metrics["interference/coverage"]
    assert coverage == pytest.approx(1) if adapter else 0 < coverage < 1
    rewards = Counter((s.group_id, s.metrics["reward"], np.float32(s.advantage)) for s in samples)
    keys = record.prompt_key_P[np.searchsorted(record.prompt_id_P, record.prompt_B)]
    recorded = Counter(zip(keys.tolist(), record.reward_B.tolist(), record.advantage_B, strict=True))
    assert recorded <= rewards and (options or recorded.total() == 16)


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_training_is_equal_up_to_rounding(options, samples, tiny_policy, tmp_path):
    options = {"max_steps": 2, "max_grad_norm": 0.0, **options}
    plain = build(tiny_policy, tmp_path / "plain", samples, **options)
    plain.train()
    attached = build(tiny_policy, tmp_path / "attached", samples, **options)
    attach(attached, every=1)
    attached.train()
    torch.testing.assert_close(parameters(attached.model), parameters(plain.model), rtol=1e-5, atol=1e-7)
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (attached, plain)]
    assert {name: logs[0][0][name] for name in LOGGED} == {name: logs[1][0][name] for name in LOGGED}
    assert {name: logs[0][1][name] for name in LOGGED} == pytest.approx(
        {name: logs[1][1][name] for name in LOGGED}, rel=1e-4, abs=1e-6
    )
    assert set(logs[1][0]) == {name for name in logs[0][0] if not name.startswith(OURS)}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_training_is_bit_equal_where_nothing_is_unshared(options, samples, tiny_policy, tmp_path):
    """The first step is logged, and its samples share nothing; the second one isn't logged."""
    samples = made_samples(tokenizer_of(tiny_policy), 12, shared=False)[:16] + samples[16:]
    plain = build(tiny_policy, tmp_path / "plain", samples, max_steps=2, **options)
    plain.train()
    attached = build(tiny_policy, tmp_path / "attached", samples, max_steps=2, **options)
    attach(attached, every=2, dim=0)
    tokens = forwarded(attached)
    attached.train()
    torch.testing.assert_close(parameters(attached.model), parameters(plain.model), rtol=0, atol=0)
    assert len(tokens) == 4
    (record,) = read_interference(tmp_path / "attached")
    assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)


def test_stale_split_and_forked_groups_are_partial(samples, tiny_policy, tmp_path):
    samples[1].model_version = 0  # the queue's reader drops it
    samples[5].completion = samples[4].completion  # one conversation, other tokens
    trainer = build(tiny_policy, tmp_path, samples, max_steps=1)
    attached = attach(trainer, every=1)
    trainer.train()
    (record,) = read_interference(tmp_path)
    # 16 samples: 3 of group 0, all of groups 1 to 3, and one of group 4
    keys = record.prompt_key_P[np.searchsorted(record.prompt_id_P, record.prompt_B)]
    assert Counter(keys.tolist()) == {0: 3, 1: 4, 2: 4, 3: 4, 4: 1}
    assert record.metrics["interference/partial_groups"] == 3
    assert np.isnan(record.sigma_P).tolist() == [True, True, False, False, True]
    assert not any(attached.recorder.statistics.alignment.state_dict().values())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_run_as_many_forwards(engine, tiny_policy, tmp_path):
    for name in ("plain", "attached"):
        arguments = (str(tiny_policy), str(tmp_path / name), name == "attached", engine == "fsdp2")
        started = start(2, run, *arguments, folder=tmp_path / name, **(FSDP2 if engine == "fsdp2" else {}))
        assert started.finish() == [0, 0], started.text()[-3000:]
    records = read_interference(tmp_path / "attached")
    assert [record.step for record in records] == [1, 2]
    for record in records:
        assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
        assert record.metrics["interference/coverage"] < 1 and all(record.prompt_text_P)
    weights = [torch.load(tmp_path / name / "weights.pt") for name in ("attached", "plain")]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


def test_a_failure_never_stops_training(samples, tiny_policy, tmp_path, caplog):
    del samples[20].metrics["reward"]
    trainer = build(tiny_policy, tmp_path, samples, max_steps=2)
    attached = attach(trainer, every=1)
    trainer.train()
    assert trainer.state.global_step == 2 and not attached.recorder.metrics()
    assert caplog.text.count("isn't logged from here on: ValueError: a sample of the rollout worker has no") == 1


def test_attach_refuses_an_auxiliary_loss_and_detach_restores(samples, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, samples)
    before = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    attach(trainer).detach()
    assert (set(vars(trainer)), list(trainer.callback_handler.callbacks)) == before
    trainer.aux_loss_enabled = True
    with pytest.raises(ValueError, match="a load-balancing loss doesn't add up"):
        attach(trainer)
