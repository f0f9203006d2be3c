"""A layer is held to the precision of its own products: nothing is left out for autocast or TF32, and a wrong one is
found all the same."""

from contextlib import contextmanager

import pytest
import torch
from harness import build, logged, messages
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_kernels.interference.gradient_sketch import GradientSketch


@pytest.fixture
def coverage(tiny_policy, tmp_path, caplog):
    """A function that trains, and gives the coverage of each step and the warnings on layers."""

    def train(*, around=None, change=None, products="highest", **options):
        torch.set_float32_matmul_precision(products)
        load = {"dtype": torch.float32, **options.pop("load", {})}
        model = AutoModelForCausalLM.from_pretrained(tiny_policy, **load)
        if change is not None:
            change(model)
        options = {"max_steps": 3, "learning_rate": 0.01, "interference_every": 1, "optim": "adamw_torch", **options}
        trainer = build(tiny_policy, tmp_path, model=model, **options)
        if around is not None:
            inner = trainer.compute_loss_context_manager
            trainer.compute_loss_context_manager = lambda: around(inner())
        trainer.train()
        found = [log["interference/coverage"] for log in logged(trainer, "interference/coverage")]
        return found, messages(caplog, "Interference excludes")

    before = torch.get_float32_matmul_precision()
    yield train
    torch.set_float32_matmul_precision(before)


def users_own(dtype):
    """A context within which the user's own autocast is on, too."""

    @contextmanager
    def both(inner):
        with inner, torch.autocast("cpu", dtype):
            yield

    return both


ROUNDED = {"products": "medium"}  # float32 multiplied as bfloat16, what TF32 is on a GPU
CASES = {
    "float32": {},
    "rounded float32": ROUNDED,
    "rounded float32, autocast too": {"bf16": True, **ROUNDED},
    "autocast by accelerate": {"bf16": True},
    "autocast by the user": {"around": users_own(torch.bfloat16)},
    "float16 autocast by the user": {"around": users_own(torch.float16)},
    "bfloat16 weights": {"load": {"dtype": torch.bfloat16}},
    "bfloat16 weights, a float32 head": {"load": {"dtype": torch.bfloat16}, "cast_lm_head_to_fp32": True},
    "autocast, exact": {"bf16": True, "interference_dim": 0},
    "autocast, TRL's head": {"bf16": True, "share_prompts": False, "skip_zero_advantage": False},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_out_for_its_precision(case, coverage):
    found, said = coverage(**CASES[case])
    assert len(found) == 3 and min(found) > 0.99 and said == []


@pytest.mark.parametrize("case", ["float32", "autocast by accelerate", "autocast by the user"])
def test_a_wrong_layer_is_found_all_the_same(case, coverage):
    """A weight that is also used without its layer has a gradient that the taps see a part of."""

    def used_twice(model):
        layer = model.model.layers[0].mlp
        inner = layer.forward
        layer.forward = lambda x: inner(x) + 0.5 * nn.functional.linear(layer.up_proj(x), layer.down_proj.weight)

    found, said = coverage(change=used_twice, **CASES[case])
    assert len(said) == 1 and "down_proj" in said[0] and "up_proj" not in said[0]
    assert all(0.05 < share < 0.999 for share in found)


def test_each_layer_has_its_own_bound():
    """A gradient that is 0.3 % off is accepted for the bfloat16 layer and rejected for the float32 layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))

    class Half(nn.Module):
        def forward(self, values):
            with torch.autocast("cpu", torch.bfloat16):
                return model[1](model[0](values).detach().requires_grad_()).float()

    values = torch.randn(6, 5, 16)
    for factor, expected in ((1.0, []), (1.003, ["0.weight"])):
        model.zero_grad()
        sketch = GradientSketch(model, 4)
        with sketch.step(seed=0), sketch.rows(torch.arange(6)):
            (model[0](values).square().sum() + Half()(values).square().sum()).backward()
        gradients = [parameter.grad * factor for parameter in sketch.trainable_parameters]
        assert list(sketch.exclude_mismatches(gradients)) == expected


def test_a_gradient_scaler_changes_nothing():
    """float16 autocast over float32 weights, the loss times 2^16: what is seen is scaled as the gradient is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 20))
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    ids = torch.randint(0, 20, (6, 5))
    sketch = GradientSketch(model, 8)
    with sketch.step(seed=0), sketch.rows(torch.arange(6)):
        with torch.autocast("cpu", torch.float16):
            logits = model(ids)
        scaler.scale(nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not sketch.exclude_mismatches([parameter.grad for parameter in sketch.trainable_parameters])


def test_adapters_over_a_quantized_base(coverage):
    """bitsandbytes multiplies in bfloat16 below float32 adapters."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def has_quantized_layers(model):
        assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())

    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    found, said = coverage(load={"quantization_config": quantized}, change=has_quantized_layers, peft_config=adapter)
    assert len(found) == 3 and min(found) > 0.99 and said == []
