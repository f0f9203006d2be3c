"""Interference logged by the trainer: the files and metrics of real runs, and that it changes nothing."""

import json

import numpy as np
import pytest
import torch
from harness import (
    build,
    by_length,
    logged,
    lora,
    loss_batches,
    messages,
    parameters,
    prompts,
    separate_gradients,
    train,
)
from transformers import TrainerCallback
from two_process_worker import run_processes

from trl_ext import read_interference
from trl_ext.recorder import recorder as interference_recorder
from trl_ext.recorder.layer_check import probe_layers

LOGGED = {"interference_every": 1, "per_device_train_batch_size": 16}
EXACT = {"interference_every": 1, "interference_dim": 0}
# a step whose every sequence runs, and that moves nothing
ALL_ROWS = {**EXACT, "max_steps": 1, "learning_rate": 0.0, "skip_zero_advantage": False}


ADAPTERS = pytest.mark.parametrize("peft_config", [None, lora(init_lora_weights=False)], ids=["full", "lora"])


def rows_of(model, losses):
    """(B, parameters) in float64: the gradient of each loss, by a backward of its own."""
    return torch.stack(
        [torch.cat([g.flatten() for g in row.values()]) for row in separate_gradients(model, losses)]
    ).double()


def losses_of_sequences(trainer, inputs):
    """The trainer's own loss, again for each sequence, with all others' advantage 0."""
    for i in range(len(inputs["prompt_ids"])):
        keep = torch.zeros(len(inputs["advantages"]))
        keep[i] = 1
        alone = {**inputs, "advantages": inputs["advantages"] * keep}
        alone.pop("micro_batch", None)  # so that the kernel takes these advantages
        yield trainer._compute_loss(trainer.model, alone)


def assert_same_matrix(found, expected, tolerance):
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@ADAPTERS
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])  # in one pass; TRL's loss on our head
def test_exact_mode_is_one_backward_for_each_sequence(loss_type, peft_config, tiny_policy, tmp_path):
    options = {**ALL_ROWS, "loss_type": loss_type, "gradient_accumulation_steps": 2}
    trainer = build(tiny_policy, tmp_path, by_length, peft_config=peft_config, **options)
    seen = [inputs for inputs, _ in loss_batches(trainer)]
    record = read_interference(tmp_path)[0]
    # accelerate divides once more where transformers is older
    trainer.current_gradient_accumulation_steps = 2 * trainer.accelerator.gradient_accumulation_steps
    truth = torch.cat([rows_of(trainer.model, losses_of_sequences(trainer, inputs)) for inputs in seen])
    gram = (truth @ truth.T).numpy()
    assert_same_matrix(record.gram_BB, gram, 1e-5)
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

    def log_probs_of_sequences():
        for i in range(len(ids)):
            logits = trainer.model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[:, :-1].float()
            logp = logits.log_softmax(-1).gather(-1, ids[i : i + 1, 1:, None])[0, :, 0]
            yield (logp[-live.shape[1] :] * live[i]).sum()

    scores = rows_of(trainer.model, log_probs_of_sequences())
    coefficient = torch.from_numpy(record.coefficient_B)
    assert_same_matrix(record.gram_BB, (coefficient[:, None] * (scores @ scores.T) * coefficient).numpy(), 1e-4)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_is_bit_equal_with_logging_on_and_off(gradient_checkpointing, tiny_policy, tmp_path, caplog):
    """Where it fails: test_no_diagnostic_ends_a_run.py."""
    options = {"gradient_checkpointing": gradient_checkpointing, "share_prompts": False}  # as a logged step runs
    off, on = (
        train(tiny_policy, tmp_path / str(every), by_length, max_steps=3, interference_every=every, **options)
        for every in (0, 1)
    )
    torch.testing.assert_close(parameters(on.model), parameters(off.model), rtol=0, atol=0)
    assert len(read_interference(tmp_path / "1")) == 3 and not messages(caplog, "nterference")
    assert all("interference/sketch_check" in entry for entry in logged(on))


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


def saved_interference(policy, folder, steps, resume=None, **options):
    """The state of the logged steps in the last checkpoint of a run."""
    saved = {"save_strategy": "steps", "save_steps": 1, "resume": resume}
    train(policy, folder, by_length, **{**LOGGED, "max_steps": steps, **saved, **options})
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["CurvatureGRPOTrainer"]["interference"]


def test_what_is_known_from_several_steps_is_saved(tiny_policy, tmp_path):
    """C counts every generated group, the alignment every logged step; both go on after a resume."""
    for steps, resume in ((2, None), (3, str(tmp_path / "checkpoint-2"))):
        saved = saved_interference(tiny_policy, tmp_path, steps, resume)
        assert saved["speedup"]["sums"][0] == steps * 4 and len(saved["alignment"]["alignment"]) == steps


@pytest.mark.parametrize(("options", "counted"), [({"steps_per_generation": 2}, 2), ({"num_iterations": 2}, 2)])
def test_the_alignment_counts_each_generation_once(options, counted, tiny_policy, tmp_path):
    saved = saved_interference(tiny_policy, tmp_path, 4, **options)
    (steps,) = saved["alignment"].values()  # off policy: of the gradients as trained
    assert len(steps) == counted


def test_two_processes_see_what_one_does(tiny_policy, tmp_path):
    for count, name in ((1, "one"), (2, "two")):
        run_processes(count, tiny_policy, tmp_path / name, interference_every=1, interference_dim=16, loss_type="grpo")
    ours, theirs = read_interference(tmp_path / "two"), read_interference(tmp_path / "one")
    assert len(ours) == len(theirs) == 3
    for record, whole in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(record.prompt_key_P, whole.prompt_key_P)
        np.testing.assert_allclose(record.gram_PP, whole.gram_PP, rtol=1e-3, atol=1e-4 * np.abs(whole.gram_PP).max())
        for name in ("interference/sketch_check", "interference/feature_cos_abs_mean_live"):
            assert record.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-3)


def test_layers_can_be_chosen(tiny_policy, tmp_path):
    message = r"'\*q_prj' matches none of the layers model.embed_tokens, model"
    with pytest.raises(ValueError, match=message):
        build(tiny_policy, tmp_path, interference_layers=["*q_prj"])
    train(tiny_policy, tmp_path, by_length, interference_layers=["*mlp*"], **LOGGED)
    assert 0 < read_interference(tmp_path)[0].metrics["interference/coverage"] < 0.9


@ADAPTERS
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


@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_layer_that_is_followed_wrongly_is_named_and_left_out(rehearsed, tiny_policy, tmp_path, caplog, monkeypatch):
    """By the rehearsal before any step; without it (parameters on several processes) by the first, which it costs."""
    if not rehearsed:
        monkeypatch.setattr(interference_recorder, "probe_layers", lambda *args: None)
    options = {**EXACT, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.0}
    trainer = build(tiny_policy, tmp_path, by_length, **options)
    layer = trainer.model.model.layers[0].mlp.down_proj
    layer.forward = lambda x, forward=layer.forward: forward(3 * x)  # its tap can't know
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
    adapter = lora(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
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
