"""A recorder attached to TRL's trainers: against one backward for each prompt, and that it changes no training."""

import json

import numpy as np
import pytest
import torch
from attach_worker import KINDS, build, run
from harness import lora, loss_batches, parameters, save_policy, train
from processes import start
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer, attach, read_interference
from trl_ext.attachment import prompt_text

HEAD = "model.embed_tokens.weight"  # tied to the head of the built-in policy


@pytest.fixture(scope="module")
def untied_policy(tmp_path_factory):
    folder = save_policy(tmp_path_factory.mktemp("untied"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    model.save_pretrained(folder)
    return folder


def one_backward_for_each_prompt(trainer, batches, texts, skipped):
    """(P, P): the gradients of the trainer's own loss, with the advantages of all other prompts 0."""
    tokenizer, rows = trainer.processing_class, []
    for text in texts:
        wanted = tokenizer.encode(f"<user>{text}<assistant>")
        trainer.model.zero_grad()
        for inputs in batches:
            own = [
                ids[mask.bool()].tolist() == wanted
                for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
            ]
            loss = trainer._compute_loss(
                trainer.model, {**inputs, "advantages": inputs["advantages"] * torch.tensor(own)}
            )
            # GRPO's loss is divided by the number of micro-batches already, RLOO's by transformers
            (loss if isinstance(trainer, GRPOTrainer) else loss / len(batches)).backward()
        named = [(name, one) for name, one in trainer.model.named_parameters() if one.requires_grad]
        flat = [torch.zeros_like(one) if one.grad is None else one.grad for name, one in named if name not in skipped]
        rows.append(torch.cat([gradient.flatten() for gradient in flat]).double())
    gradient_PN = torch.stack(rows)
    return (gradient_PN @ gradient_PN.T).numpy()


def assert_own_rewards(record, n_prompts):
    """What the loss doesn't get, each row's group and reward: an advantage has the sign of its reward less the mean."""
    rewards = np.stack([record.reward_B[record.prompt_B == prompt] for prompt in record.prompt_id_P])
    assert rewards.shape == (n_prompts, 4)
    np.testing.assert_allclose(rewards.std(1), record.sigma_P, atol=1e-6)
    for prompt in record.prompt_id_P:
        mine = record.prompt_B == prompt
        centred = record.reward_B[mine] - record.reward_B[mine].mean()
        assert (np.sign(record.advantage_B[mine].round(6)) == np.sign(centred.round(6))).all()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_gradients_are_those_of_one_backward_each(kind, adapter, tiny_policy, tmp_path, caplog):
    peft_config = lora(init_lora_weights=False) if adapter else None
    trainer = build(kind, tiny_policy, tmp_path, peft_config, max_steps=1, learning_rate=0.0)
    attached = attach(trainer, every=1, dim=0)
    batches = [inputs for inputs, _ in loss_batches(trainer)]
    assert len(batches) == 2 and not any("recorder" in name for inputs in batches for name in inputs)
    (record,) = read_interference(tmp_path)
    assert len(record.prompt_text_P) == 4 and all(record.prompt_text_P)
    expected = one_backward_for_each_prompt(trainer, batches, record.prompt_text_P, () if adapter else (HEAD,))
    assert np.linalg.norm(record.gram_PP - expected) <= 1e-4 * np.linalg.norm(expected)
    assert (np.diag(expected) > 0).sum() >= 2
    metrics = attached.recorder.metrics()
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
    assert (f"tensors: {HEAD}." in caplog.text) is not adapter
    assert "excludes" not in caplog.text
    coverage = metrics["interference/coverage"]
    assert coverage == pytest.approx(1) if adapter else 0 < coverage < 1
    assert_own_rewards(record, 4)


def test_an_untied_head_is_named_and_the_embeddings_are_recorded(untied_policy, tmp_path, caplog):
    trainer = build("rloo", untied_policy, tmp_path, max_steps=1)
    attach(trainer, every=1, dim=16)
    trainer.train()
    (record,) = read_interference(tmp_path)
    assert "trainable tensors: lm_head.weight." in caplog.text and "excludes" not in caplog.text
    assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"num_iterations": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_equal(kind, options, tiny_policy, tmp_path):
    options = {"max_steps": 3, "eval_strategy": "no", **options}
    plain = build(kind, tiny_policy, tmp_path / "plain", **options)
    plain.train()
    attached = build(kind, tiny_policy, tmp_path / "attached", **options)
    attach(attached, every=2)
    attached.train()
    torch.testing.assert_close(parameters(attached.model), parameters(plain.model), rtol=0, atol=0)
    assert [record.step for record in read_interference(tmp_path / "attached")] == [1, 3]
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (plain, attached)]
    assert [log.get("reward") for log in logs[0]] == [log.get("reward") for log in logs[1]]
    assert ["interference/coverage" in log for log in logs[1]] == [True, False, True]
    assert not any(name.startswith("interference/") for log in logs[0] for name in log)


def test_groups_that_are_split_over_steps_are_partial(tiny_policy, tmp_path):
    """RLOO shuffles the generation batch, of which a step takes a half."""
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
    trainer = build("rloo", tiny_policy, tmp_path, **options)
    attached = attach(trainer, every=1)
    trainer.train()
    for record in read_interference(tmp_path):
        partial_P = np.array([(record.prompt_B == prompt).sum() < 4 for prompt in record.prompt_id_P])
        assert partial_P.any() and record.metrics["interference/partial_groups"] == partial_P.sum()
        assert (np.isnan(record.sigma_P) == partial_P).all()
    assert not any(attached.recorder.statistics.alignment.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_put_split_groups_together(kind, tiny_policy, tmp_path):
    """Three groups of four, the second split between the processes."""
    started = start(2, run, kind, str(tiny_policy), str(tmp_path), folder=tmp_path)
    assert started.finish() == [0, 0], started.text()[-3000:]
    records = read_interference(tmp_path)
    assert [record.step for record in records] == [1, 2]
    for record in records:
        assert len(set(record.prompt_text_P)) == 3 and "interference/partial_groups" not in record.metrics
        assert_own_rewards(record, 3)
        assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)


def test_a_resumed_run_goes_on(tiny_policy, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer = build("rloo", tiny_policy, tmp_path, max_steps=2, **saved)
    attach(trainer, every=2)
    trainer.train()
    trainer = build("rloo", tiny_policy, tmp_path, max_steps=4, **saved)
    attached = attach(trainer, every=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record.step for record in read_interference(tmp_path)] == [1, 3]
    assert attached.recorder.state_dict()["statistics"]["speedup"]["sums"][0] == 8  # groups of both logged steps


def test_a_saved_state_of_another_kind_ends_the_logging_alone(tiny_policy, tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer = build("grpo", tiny_policy, tmp_path, max_steps=2, **saved)
    attach(trainer, every=1)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["GradientRecorder"]["statistics"]
    file.write_text(json.dumps(state))
    trainer = build("grpo", tiny_policy, tmp_path, max_steps=4, **saved)
    attach(trainer, every=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert caplog.text.count("this isn't a state of GradientRecorder: it has no 'statistics'") == 1


def test_a_run_that_was_interrupted_between_micro_batches_trains_again(tiny_policy, tmp_path):
    class Interrupt(TrainerCallback):
        on = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.on:
                raise KeyboardInterrupt

    trainer = build("grpo", tiny_policy, tmp_path, max_steps=2)
    attach(trainer, every=1, dim=0)
    trainer.add_callback(interrupt := Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    interrupt.on = False
    trainer.train()
    records = read_interference(tmp_path)
    assert [record.step for record in records] == [1, 2]
    assert all(record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4) for record in records)


def test_a_failure_never_stops_training(tiny_policy, tmp_path, monkeypatch, caplog):
    trainer = build("grpo", tiny_policy, tmp_path, max_steps=3)
    attached = attach(trainer, every=1)
    monkeypatch.setattr(attached.recorder, "rows", lambda *args, **kwargs: 1 / 0)
    trainer.train()
    assert trainer.state.global_step == 3 and not attached.recorder.metrics()
    assert caplog.text.count("isn't logged from here on: ZeroDivisionError") == 1


def test_detach_restores_the_trainer(tiny_policy, tmp_path):
    trainer = build("rloo", tiny_policy, tmp_path)
    before = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    attached = attach(trainer)
    with pytest.raises(ValueError, match="a recorder is attached to this trainer already"):
        attach(trainer)
    attached.detach()
    assert (set(vars(trainer)), list(trainer.callback_handler.callbacks)) == before
    attach(trainer)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([{"role": "user", "content": "1 + 1"}], "1 + 1"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], " what?"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], ""),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "tool_calls": []}], ""),
        ([], ""),
    ],
)
def test_a_prompt_without_a_text_has_an_empty_one(prompt, text):
    """Else the recorder would be switched off."""
    assert prompt_text(prompt) == text


def test_a_trainer_that_trains_twice_begins_its_records_anew(tiny_policy, tmp_path):
    trainer = build("grpo", tiny_policy, tmp_path, max_steps=3)
    attached = attach(trainer, every=2, dim=8)
    trainer.train()
    trainer.args.max_steps = 1
    trainer.train()
    with pytest.warns(UserWarning, match="1 files of an earlier run are skipped"):
        assert [record.step for record in read_interference(tmp_path)] == [1]
    assert attached.recorder.statistics.speedup.state_dict()["sums"][0] == 4  # groups of one step


def test_our_trainer_in_the_same_folder_has_the_files_of_its_own_run(tiny_policy, tmp_path):
    trainer = build("grpo", tiny_policy, tmp_path, max_steps=2)
    attach(trainer, every=1, dim=8)
    trainer.train()
    options = {"interference_every": 1, "interference_dim": 8, "save_strategy": "steps", "save_steps": 1}
    train(tiny_policy, tmp_path, max_steps=1, **options)
    with pytest.warns(UserWarning, match="1 files of an earlier run are skipped"):
        (record,) = read_interference(tmp_path)
    assert record.step == 1 and "noise/within" in record.metrics  # attach has no coefficients for it
    train(tiny_policy, tmp_path, max_steps=2, resume=str(tmp_path / "checkpoint-1"), **options)
    assert [record.step for record in read_interference(tmp_path)] == [1, 2]


def test_detach_between_micro_batches_leaves_no_hook(tiny_policy, tmp_path):
    trainer = build("grpo", tiny_policy, tmp_path, max_steps=2)
    attached = attach(trainer, every=1, dim=8)

    class Detach(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            attached.detach()  # in each later step once more

    trainer.add_callback(Detach())
    trainer.train()
    assert trainer.state.global_step == 2 and not hasattr(trainer, "_attached_recorder")
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_other_trainers_are_refused(tiny_policy, tmp_path):
    from harness import build as build_ours

    with pytest.raises(ValueError, match="set interference_every"):
        attach(build_ours(tiny_policy, tmp_path, trainer_class=CurvatureGRPOTrainer))
    with pytest.raises(ValueError, match=r"attach works with .* AsyncGRPOTrainer, not with object"):
        attach(object())
