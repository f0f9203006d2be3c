"""Interference logged by the trainer: the files and metrics of real runs, and that it changes nothing."""

import json

import numpy as np
import pytest
import torch
from harness import build, by_length, digits, logged, loss_batches, messages, prompts, train
from peft import LoraConfig
from transformers import TrainerCallback
from two_process_worker import run_processes

from trl_ext import read_interference
from trl_ext.recorder import recorder as interference_recorder
from trl_ext.recorder.layer_check import probe_layers

LOGGED = {"interference_every": 1, "per_device_train_batch_size": 16}
EXACT = {"interference_every": 1, "interference_dim": 0}
# a step whose every sequence runs, and that moves nothing
ALL_ROWS = {**EXACT, "max_steps": 1, "learning_rate": 0.0, "skip_zero_advantage": False}


def lora():
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def gradients_by_backward(trainer, inputs):
    """(B, parameters): one backward of the trainer's own loss for each sequence, all others' weight 0."""
    rows = []
    for i in range(len(inputs["prompt_ids"])):
        alone = dict(inputs)
        keep = torch.zeros(len(inputs["advantages"]))
        keep[i] = 1
        alone["advantages"] = inputs["advantages"] * keep
        alone.pop("micro_batch", None)  # so that the kernel takes these advantages
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, alone).backward()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        rows.append(
            torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in parameters])
        )
    trainer.model.zero_grad()
    return torch.stack(rows).double()


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])  # in one pass; TRL's loss on our head
def test_exact_mode_is_one_backward_for_each_sequence(loss_type, peft_config, tiny_policy, tmp_path):
    options = {**ALL_ROWS, "loss_type": loss_type, "gradient_accumulation_steps": 2}
    trainer = build(tiny_policy, tmp_path, by_length, peft_config=peft_config, **options)
    seen = [inputs for inputs, _ in loss_batches(trainer)]
    record = read_interference(tmp_path)[0]
    trainer.current_gradient_accumulation_steps = 2
    truth = torch.cat([gradients_by_backward(trainer, inputs) for inputs in seen])
    gram = (truth @ truth.T).numpy()
    assert np.linalg.norm(record.gram_BB - gram) <= 1e-5 * np.linalg.norm(gram)
    assert (np.diag(gram) > 0).sum() > 8
    metrics = record.metrics
    assert metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
    assert metrics["interference/coverage"] == pytest.approx(1, abs=1e-6)
    if loss_type == "vespo":
        assert record.coefficient_B is None and "curvature/fisher_trace_mean" not in metrics
        return
    # the coefficients: u_i = c_i s_i, and s_i doesn't know the reward
    scores = truth[torch.from_numpy(record.coefficient_B) != 0]
    assert (np.sign(record.coefficient_B) == -np.sign(torch.cat([i["advantages"] for i in seen]).numpy())).all()
    assert scores.norm(dim=1).min() > 0
    assert metrics["curvature/fisher_trace_mean"] > 0


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "dr_grpo", "luspo"])
def test_coefficients_are_in_front_of_the_score(loss_type, tiny_policy, tmp_path):
    """u_i / c_i is the gradient of the sequence's log-prob, made by plain autograd."""
    trainer = build(tiny_policy, tmp_path, by_length, loss_type=loss_type, **ALL_ROWS)
    inputs = loss_batches(trainer)[0][0]
    record = read_interference(tmp_path)[0]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    live = inputs["completion_mask"].float()
    rows = []
    for i in range(len(ids)):
        trainer.model.zero_grad()
        logits = trainer.model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, ids[i : i + 1, 1:, None])[0, :, 0]
        (logp[-live.shape[1] :] * live[i]).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    scores = torch.stack(rows).double()
    coefficient = torch.from_numpy(record.coefficient_B)
    gram = coefficient[:, None] * (scores @ scores.T) * coefficient
    assert np.linalg.norm(record.gram_BB - gram.numpy()) <= 1e-4 * gram.norm().item()


def parameters_after(policy, folder, **options):
    trainer = train(policy, folder, by_length, max_steps=3, **options)
    return list(trainer.model.parameters()), logged(trainer)


FAILING = {
    "a layer": ("grpo_kernels.interference.sequence_rows.SequenceRows.outer", "MemoryError: no room"),
    "the metrics": ("trl_ext.recorder.measure.interference_metrics", "Interference isn't logged from here on"),
    "the file": ("trl_ext.recorder.recorder.write_step", "without its files"),
    "the taps": ("trl_ext.recorder.recorder.GradientSketch.open", "Interference isn't logged from here on"),
}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_is_bit_equal_with_logging_on_off_and_failing(
    gradient_checkpointing, tiny_policy, tmp_path, monkeypatch, caplog
):
    options = {"gradient_checkpointing": gradient_checkpointing, "share_prompts": False}  # as a logged step runs
    off, _ = parameters_after(tiny_policy, tmp_path / "off", interference_every=0, **options)
    caplog.clear()
    on, logs = parameters_after(tiny_policy, tmp_path / "on", interference_every=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))
    assert len(read_interference(tmp_path / "on")) == 3 and not messages(caplog, "nterference")
    assert all("interference/sketch_check" in entry for entry in logs)

    def broken(*args, **kwargs):
        raise MemoryError("no room")

    for name, (place, message) in FAILING.items():
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            failed, _ = parameters_after(tiny_policy, tmp_path / name, interference_every=1, **options)
        assert all(torch.equal(a, b) for a, b in zip(off, failed, strict=True)), name
        said = messages(caplog, "no room")
        assert any(message in text for text in said) and len(said) == len(set(said)), (name, said)


def test_logged_at_its_interval_and_read_back(tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, by_length, **{**LOGGED, "interference_every": 2, "max_steps": 5})
    records, logs = read_interference(tmp_path), logged(trainer)
    assert [record.step for record in records] == [1, 3, 5]
    assert ["interference/coverage" in entry for entry in logs] == [True, False, True, False, True]
    first = records[0]
    assert first.gram_BB.shape == (16, 16) and first.gram_PP.shape == (4, 4)
    assert logs[0]["interference/coverage"] == pytest.approx(first.metrics["interference/coverage"])
    questions = {row[0]["content"] for row in prompts(64)["prompt"]}
    assert len(set(first.prompt_text_P)) == 4 and set(first.prompt_text_P) <= questions
    assert first.metrics["interference/sketch_check"] == pytest.approx(1, abs=0.2)
    assert len(set(first.prompt_key_P.tolist())) == 4


@pytest.mark.parametrize(("accumulation", "per_generation", "prompts"), [(4, 2, 4), (2, 2, 2)])
def test_a_step_of_several_generations_has_all_their_prompts(
    accumulation, per_generation, prompts, tiny_policy, tmp_path
):
    options = {"gradient_accumulation_steps": accumulation, "steps_per_generation": per_generation}
    options |= {"interference_every": 1, "per_device_train_batch_size": 4, "normalization": "curvature"}
    trainer = train(tiny_policy, tmp_path, by_length, **options)
    for record in read_interference(tmp_path):
        assert len(set(record.prompt_B.tolist())) == prompts and len(record.prompt_B) == 4 * accumulation
        assert all(record.prompt_text_P) and len(set(record.prompt_key_P.tolist())) == prompts
    assert any("normalization/curvature_bins" in log for log in trainer.state.log_history)


def test_phase_and_constant_are_saved(tiny_policy, tmp_path):
    train(tiny_policy, tmp_path, by_length, **LOGGED, save_strategy="steps", save_steps=1)

    def saved(step):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        return state["stateful_callbacks"]["CurvatureGRPOTrainer"]["interference"]

    assert saved(2)["speedup"]["steps"] == 2
    options = {**LOGGED, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    train(tiny_policy, tmp_path, by_length, **options, resume=str(tmp_path / "checkpoint-2"))
    assert saved(3)["speedup"]["steps"] == 3


def test_two_processes_see_what_one_does(tiny_policy, tmp_path):
    options = {"interference_every": 1, "interference_dim": 16, "loss_type": "grpo"}
    one = run_processes(1, tiny_policy, tmp_path / "one", **options)[0]
    run_processes(2, tiny_policy, tmp_path / "two", **options)
    ours, theirs = read_interference(tmp_path / "two"), read_interference(tmp_path / "one")
    assert len(ours) == len(theirs) == 3 and one["logs"]
    for record, whole in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(record.prompt_key_P, whole.prompt_key_P)
        np.testing.assert_allclose(record.gram_PP, whole.gram_PP, rtol=1e-3, atol=1e-4 * np.abs(whole.gram_PP).max())
        for name in ("interference/sketch_check", "interference/feature_cos_abs_mean_live"):
            assert record.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interference_layers": ["*q_prj"]}, r"'\*q_prj' matches none of the layers model.embed_tokens, model"),
    ],
)
def test_bad_input_is_named_before_training(options, message, tiny_policy, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tiny_policy, tmp_path, digits, **options)


def test_layers_can_be_chosen(tiny_policy, tmp_path):
    train(tiny_policy, tmp_path, by_length, interference_layers=["*mlp*"], **LOGGED)
    assert 0 < read_interference(tmp_path)[0].metrics["interference/coverage"] < 0.9


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_features_of_the_prompts(peft_config, tiny_policy, tmp_path):
    """The mean hidden state of a prompt's tokens alone, without padding and completion, by hand."""
    options = {**LOGGED, "max_steps": 1, "learning_rate": 0.0, "skip_zero_advantage": False}
    trainer = train(tiny_policy, tmp_path, by_length, peft_config=peft_config, **options)
    record = read_interference(tmp_path)[0]
    model = trainer.accelerator.unwrap_model(trainer.model)
    features = []
    for text in record.prompt_text_P:
        ids = trainer.processing_class.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            features.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0))
    features = torch.nn.functional.normalize(torch.stack(features), dim=1)
    cosines = (features @ features.T)[*torch.triu_indices(4, 4, 1)]
    assert record.metrics["interference/feature_cos_abs_mean"] == pytest.approx(cosines.abs().mean().item(), abs=1e-4)


def test_a_gradient_scaler_is_undone(tiny_policy, tmp_path):
    """fp16's loss scale is in every gradient that a tap sees, and in none that is logged."""
    records = []
    for scale in (None, 1024.0):
        options = {**LOGGED, "max_steps": 1, "learning_rate": 0.0}
        trainer = build(tiny_policy, tmp_path / str(scale), by_length, **options)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        records.append(read_interference(tmp_path / str(scale))[0])
    plain, scaled = records
    np.testing.assert_allclose(scaled.gram_BB, plain.gram_BB, rtol=1e-4, atol=1e-5 * np.abs(plain.gram_BB).max())
    for name in ("sketch_check", "coverage", "cos_mean"):
        assert scaled.metrics[f"interference/{name}"] == pytest.approx(plain.metrics[f"interference/{name}"], rel=1e-3)


def wrongly_followed(policy, folder, **options):
    """A trainer whose first MLP's ``down_proj`` multiplies what it is given by three: its tap can't know."""
    trainer = build(policy, folder, by_length, interference_every=1, max_steps=3, learning_rate=0.0, **options)
    layer = trainer.model.model.layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: forward(3 * x)
    return trainer


@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_layer_that_is_followed_wrongly_is_named_and_left_out(rehearsed, tiny_policy, tmp_path, caplog, monkeypatch):
    """By the rehearsal before any step; without it (parameters on several processes) by the first, which it costs."""
    if not rehearsed:
        monkeypatch.setattr(interference_recorder, "probe_layers", lambda *args: None)
    trainer = wrongly_followed(tiny_policy, tmp_path, interference_dim=0, gradient_accumulation_steps=2)
    trainer.train()
    records = read_interference(tmp_path)
    assert [record.step for record in records] == ([1, 2, 3] if rehearsed else [2, 3])
    assert "Interference excludes 1 parameters whose sum over sequences isn't their gradient" in caplog.text
    assert "model.layers.mlp.down_proj.weight" in caplog.text
    assert ("Interference of optimizer step 1 isn't logged" in caplog.text) is not rehearsed
    for record in records:
        assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
        assert 0.3 < record.metrics["interference/coverage"] < 0.999


def test_a_rehearsal_changes_nothing(tiny_policy, tmp_path):
    """No gradient, no mode, no random number, no step: and what it finds out is right of the built-in model."""
    trainer = build(tiny_policy, tmp_path)
    model = trainer.model.train()
    model.lm_head.eval()
    before, said = torch.get_rng_state(), []
    sketch = interference_recorder.GradientSketch(model, 8)
    probe_layers(sketch, model, trainer.accelerator, lambda *text: said.append(text))
    assert torch.equal(torch.get_rng_state(), before) and not said
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.model.training and not model.lm_head.training
    assert not sketch.untapped


def test_an_adapter_on_the_head_is_found_out_by_the_first_step(tiny_policy, tmp_path, caplog):
    """The fused head takes its B without calling it, which a rehearsal of the model's own forward doesn't show."""
    adapter = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    train(tiny_policy, tmp_path, by_length, **EXACT, max_steps=3, peft_config=adapter)
    records = read_interference(tmp_path)
    assert len(records) >= 2
    assert all(record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-3) for record in records)
    assert "Interference excludes" in caplog.text and "lm_head.lora_B" in caplog.text


def test_evaluation_between_two_micro_batches_is_of_no_row(tiny_policy, tmp_path):
    """A callback that evaluates in the middle of a logged step: what is logged is what it was without."""

    class Evaluates(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            random = torch.get_rng_state()
            trainer.evaluate()
            torch.set_rng_state(random)

    options = {**EXACT, "gradient_accumulation_steps": 2, "eval_dataset": prompts(8, "held_out")}
    found = []
    for evaluates in (False, True):
        callbacks = [Evaluates()] if evaluates else []
        trainer = build(tiny_policy, tmp_path / str(evaluates), by_length, callbacks=callbacks, **options)
        trainer.train()
        found.append(read_interference(tmp_path / str(evaluates)))
    for plain, evaluated in zip(*found, strict=True):
        np.testing.assert_allclose(evaluated.gram_BB, plain.gram_BB, rtol=1e-4, atol=1e-7)
        assert evaluated.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-4)
