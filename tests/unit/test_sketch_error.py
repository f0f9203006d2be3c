"""The sketch's error as it is predicted, against what is observed; on a transformer: test_sketch_accuracy.py."""

import math

import pytest
import torch

from grpo_kernels.interference.layer_taps import Layer
from grpo_kernels.interference.projections import Projections
from grpo_kernels.interference.sequence_rows import SequenceRows
from grpo_kernels.interference.sketch_error import predicted_rmse


@pytest.mark.parametrize("cosine", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("numbers", [6000, 100])
@pytest.mark.parametrize("parts", [2, 4])
def test_predicted_rmse_of_folded_numbers(parts, numbers, cosine):
    """Numbers with random signs into 400 entries in all: the error is (1 - cos^2) / sqrt(400), however few meet."""
    generator = torch.Generator().manual_seed(1)
    pair = torch.randn(2, numbers, generator=generator, dtype=torch.float64)
    pair[1] = cosine * pair[0] + math.sqrt(1 - cosine**2) * pair[1]
    exact = torch.nn.functional.cosine_similarity(*pair, dim=0)
    observed, predicted = [], []
    for _ in range(600):
        signs = torch.randint(0, 2, (parts, 1, numbers), generator=generator) * 2 - 1
        place = torch.randint(0, 400 // parts, (parts, numbers), generator=generator)
        empty = torch.zeros(2, 400 // parts, dtype=torch.float64)
        sketch = torch.stack([empty.index_add(1, p, pair * s) for p, s in zip(place, signs, strict=True)], dim=1)
        observed.append((torch.nn.functional.cosine_similarity(*sketch.flatten(1), dim=0) - exact).square())
        predicted.append(predicted_rmse(sketch, torch.tensor([4, 1])) ** 2)
    ratio = (sum(predicted) / sum(observed).item()) ** 0.5
    assert ratio == pytest.approx(1.0, abs=0.15)
    assert (sum(predicted) / 600) ** 0.5 == pytest.approx((1 - exact.item() ** 2) / 20, rel=0.15)


def test_predicted_rmse_sums_sequences_and_needs_a_pair():
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(6, 4, 16, generator=generator)
    halves, prompts = torch.cat([sketch * 0.25, sketch * 0.75]), torch.tensor([4, 9, 1, 0, 2, 3])
    whole = predicted_rmse(sketch, prompts)
    assert predicted_rmse(halves, torch.cat([prompts, prompts])) == pytest.approx(whole, rel=1e-5)
    assert predicted_rmse(1e-12 * sketch, prompts) == pytest.approx(whole, rel=1e-5)
    # 64 independent entries: the variance of a cosine is 1/64
    assert whole == pytest.approx(1 / 8, rel=0.3)
    assert predicted_rmse(sketch, torch.zeros(6, dtype=torch.int64)) == 0.0
    assert predicted_rmse(sketch * (torch.arange(6) == 2)[:, None, None], prompts) == 0.0
    same = sketch[:1].expand(6, 4, 16)  # a cosine of 1 is exact
    assert predicted_rmse(same, prompts) == pytest.approx(0.0, abs=1e-7)


def sketch_of(layers, seed: int) -> torch.Tensor:
    """The sketch of six sequences' gradients of square layers, k = 16."""
    (left, _), *_ = layers
    projections = Projections(16, seed, left.device, [(left.shape[-1],) * 2] * len(layers))
    rows = SequenceRows(torch.arange(6), None, 6)
    for number, (left, right) in enumerate(layers):
        layer = Layer("linear", torch.nn.Identity(), "linear", number, None, section="model")
        projections.outer(rows, [layer], [left], [right])
    projections.finish(rows)
    return rows.total["model"]


@pytest.mark.parametrize("width", [20, 47, 48, 120])  # 3 k = 48: narrower sides aren't folded
def test_predicted_rmse_of_layers_of_any_width(width):
    """Eight layers; before each replicate had signs of its own, it was 6 to 9 % too low below 3 k."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 6, 3, width, generator=generator).unbind() for _ in range(8)]
    gradients = torch.cat([torch.einsum("btd,bta->bda", *layer).flatten(1) for layer in layers], dim=1)
    unit = torch.nn.functional.normalize(gradients.double(), dim=1)
    observed = predicted = 0.0
    above = torch.triu_indices(6, 6, 1).unbind()
    for seed in range(150):
        sketch = sketch_of(layers, seed)
        found = torch.nn.functional.normalize(sketch.flatten(1).double(), dim=1)
        observed += (found @ found.T - unit @ unit.T)[above].square().mean().item()
        predicted += predicted_rmse(sketch, torch.arange(6)) ** 2
    assert (predicted / observed) ** 0.5 == pytest.approx(1.0, abs=0.05)
