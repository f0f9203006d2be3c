"""Only some decoder layers are checkpointed: the same gradients, and fewer layers recomputed."""

import pytest
import torch
from harness import assert_same_gradients, build, lora, parameters, train
from transformers import AutoModelForCausalLM

OPTIONS = {"gradient_checkpointing": True, "max_steps": 2, "loss_type": "grpo"}


def count_forwards(trainer):
    """Returns how often each layer's MLP runs with a gradient: twice a micro-batch where the layer is recomputed."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    layers = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers
    counts = [0] * len(layers)

    def counter(i):
        def hook(module, args):
            counts[i] += torch.is_grad_enabled() and module.training

        return hook

    for i, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(counter(i))
    return counts


@pytest.mark.parametrize("options", [{"interference_every": 0}, {"interference_every": 1}, {"peft_config": lora()}])
@pytest.mark.parametrize("count", [None, 0, 1, 9])
def test_only_the_first_layers_are_recomputed(count, options, tiny_policy, tmp_path):
    options = {**OPTIONS, **options}
    kept = train(tiny_policy, tmp_path / "kept", **{**options, "gradient_checkpointing": False})
    trainer = build(tiny_policy, tmp_path / "ours", checkpoint_layers=count, **options)
    counts = count_forwards(trainer)
    trainer.train()
    n_layers = len(counts)
    recomputed = n_layers if count is None else min(count, n_layers)
    assert n_layers > 1 and counts == [4] * recomputed + [2] * (n_layers - recomputed)
    assert_same_gradients(trainer.recorder.gradients, kept.recorder.gradients, tolerance=1e-6)
    torch.testing.assert_close(parameters(trainer.model), parameters(kept.model), rtol=1e-6, atol=1e-6)


def test_the_flags_of_the_users_model_are_as_trl_sets_them(tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, checkpoint_layers=1, **OPTIONS)
    assert all(layer.gradient_checkpointing for layer in trainer.model.model.layers)


def test_with_the_kl_penalty_which_scores_between_generation_and_loss(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, checkpoint_layers=1, beta=0.1, **OPTIONS)
    counts = count_forwards(trainer)
    trainer.train()
    assert counts[0] == 4 and set(counts[1:]) == {2}


def test_a_model_without_such_layers_is_refused(tiny_policy, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    monkeypatch.setattr("trl_ext.checkpointed_layers.GradientCheckpointingLayer", torch.nn.Conv3d)
    with pytest.raises(ValueError, match=r"checkpoint_layers=1 must be None: .* can't checkpoint single layers"):
        build(tiny_policy, tmp_path, model=model, checkpoint_layers=1, **OPTIONS)
