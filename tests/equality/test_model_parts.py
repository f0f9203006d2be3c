"""Interference by part of the model: which layer is of which, and sums that are the whole's and the parameters' own."""

import numpy as np
import pytest
import torch
from architectures import NAMES
from architectures import build as build_architecture
from harness import graded, lora, train

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.model_parts import PARTS_OF_MODEL, part_metrics, part_of
from trl_ext import read_interference


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("model.layers.0.self_attn.q_proj", "linear", "attention_early"),
        ("model.layers.3.mlp.up_proj", "linear", "mlp_middle"),
        ("base_model.model.model.layers.5.self_attn.o_proj.lora_A.default", "linear", "attention_late"),
        ("transformer.h.5.attn.c_attn", "transposed", "attention_late"),
        ("model.layers.2.input_layernorm", "norm", "norms"),
        ("model.norm", "norm", "norms"),
        ("model.embed_tokens", "embedding", "embedding_head"),
        ("lm_head", "head", "embedding_head"),
        ("backbone.layers.1.mixer.in_proj", "linear", "mlp_early"),
        ("score", "linear", "mlp_late"),
        ("gpt_neox.layers.2.attention.query_key_value", "linear", "attention_middle"),
    ],
)
def test_which_part_a_layer_is_of(name, kind, part):
    assert part_of(name, kind, 6) == part and part in PARTS_OF_MODEL


@pytest.mark.parametrize(
    "name", [name for name in ("llama", "gpt_neox", "qwen3_moe", "mamba", "gemma3_text") if name in NAMES]
)
@pytest.mark.parametrize("dim", [0, 16])
def test_parts_sum_to_the_whole(name, dim):
    torch.manual_seed(0)
    model = build_architecture(name).eval()
    sketch = GradientSketch(model, dim, by_part=True, on_error=lambda *_: None)
    ids = torch.randint(2, 90, (4, 10), generator=torch.Generator().manual_seed(1))
    with sketch.step(0) as recorded, sketch.rows(torch.arange(4)):
        model(input_ids=ids, use_cache=False).logits.sin().sum().backward()
    (step,) = recorded
    flat = step.sketch.double()
    parts = {name: flat[..., columns].flatten(1) for name, columns in step.sections.items()}
    grams = {name: part @ part.T for name, part in parts.items()}
    torch.testing.assert_close(sum(grams.values()), step.gram(), rtol=1e-12, atol=1e-12)
    assert len(grams) >= 4 and all(float(gram.diagonal().min()) >= 0 for gram in grams.values())
    if dim == 0:  # each is what its parameters' gradients are
        section = {n: layer.section for layer in sketch.layers for n in (layer.weight, layer.bias) if n is not None}
        squares = [0 if p.grad is None else float(p.grad.double().square().sum()) for p in sketch.trainable_parameters]
        for name, gram in grams.items():
            of_part = sum(squares[number] for number, part in section.items() if part == name)
            assert float(gram.sum()) == pytest.approx(of_part, rel=1e-4)


@pytest.mark.parametrize("adapter", [None, lora(init_lora_weights=False)], ids=["full", "lora"])
def test_a_run(adapter, tiny_policy, tmp_path):
    options = {"interference_every": 1, "per_device_train_batch_size": 16, "learning_rate": 0.0}
    options |= {"interference_parts": True, "peft_config": adapter}
    found = {}
    for dim in (0, 64):
        train(tiny_policy, tmp_path / str(dim), graded, interference_dim=dim, **options)
        found[dim] = read_interference(tmp_path / str(dim))
        assert len(found[dim]) == 2
    for exact, sketched in zip(found[0], found[64], strict=True):
        np.testing.assert_allclose(sum(exact.gram_parts.values()), exact.gram_PP, rtol=1e-4, atol=1e-8)
        shares = {n: v for n, v in exact.metrics.items() if n.startswith("parts/") and n.endswith("/share")}
        assert sum(shares.values()) == pytest.approx(1) and len(shares) == (4 if adapter else 6)  # of two blocks
        assert all(sketched.metrics[name] == pytest.approx(share, abs=0.1) for name, share in shares.items())
        for name in shares:
            of_part = name.removesuffix("share")
            assert exact.metrics[of_part + "sketch_rmse"] == 0 < sketched.metrics[of_part + "sketch_rmse"] < 0.2
            off = abs(sketched.metrics[of_part + "cos_mean"] - exact.metrics[of_part + "cos_mean"])
            assert off < 5 * sketched.metrics[of_part + "sketch_rmse"]


def test_without_parts_nothing_of_them_is_logged(tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, graded, interference_every=1)
    assert not any(name.startswith("parts/") for entry in trainer.state.log_history for name in entry)
    assert all(record.gram_parts is None for record in read_interference(tmp_path))


def test_by_part_is_yes_or_no():
    with pytest.raises(ValueError, match="by_part='norms' must be True or False"):
        GradientSketch(torch.nn.Linear(2, 2), 4, by_part="norms")


def test_metrics_by_hand():
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    other = torch.diag(torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64))
    found = part_metrics({"norms": gram, "mlp_late": other}, {"norms": 0.1, "mlp_late": 0.2})
    assert found == {
        "parts/norms/share": 0.5,
        "parts/norms/cos_mean": 0.5,
        "parts/norms/cos_abs_mean": 0.5,
        "parts/norms/sketch_rmse": 0.1,
        "parts/mlp_late/share": 0.5,
    }
    assert part_metrics({"norms": 0 * gram}, {"norms": 0.1}) == {}
