"""Layers whose taps record something else are found out: the sum over sequences isn't the parameter's gradient."""

import pytest
import torch
from torch import nn

from grpo_kernels.interference.gradient_sketch import GradientSketch


class ScaledAfterwards(nn.Linear):
    """Its output isn't its weight's alone, and the tap can't know: the gradient of the weight is three times."""

    def forward(self, x):
        return super().forward(3 * x)


class Unseen(nn.Module):
    """A Linear whose weight is used, and whose forward isn't called; a norm with a gate."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 6), ScaledAfterwards(6, 6), nn.Linear(6, 6)
        self.frozen_part, self.right = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        x = torch.nn.functional.linear(torch.tanh(x), self.unused.weight, self.unused.bias)
        return self.right(torch.tanh(x) + 0 * self.frozen_part(x))


@pytest.mark.parametrize("dim", [0, 8])
def test_a_layer_whose_sum_is_not_its_gradient_is_left_out(dim):
    torch.manual_seed(0)
    model = Unseen()
    sketch = GradientSketch(model, dim)

    def step():
        model.zero_grad()
        with sketch.step(1) as recorded, sketch.rows(torch.tensor([0, 1, 1])):
            (model(torch.randn(3, 5, 6)) * torch.tensor([1.0, -2.0, 0.5])[:, None, None]).sum().backward()
        return recorded[0], sketch.exclude_mismatches([p.grad for p in sketch.trainable_parameters])

    _, wrong = step()
    assert set(wrong) == {"second.weight", "unused.weight", "unused.bias"}  # second.bias is right
    assert wrong["unused.weight"] == float("inf") and wrong["second.weight"] > 0.1
    for _ in range(10):  # from here on only those that are right, checked again and again
        recorded, wrong = step()
        assert not wrong
    names = {name for name, p in model.named_parameters() if any(p is q for q in sketch.tapped_parameters)}
    assert names == {"first.weight", "first.bias", "second.bias", "right.weight", "right.bias", "frozen_part.weight"}
    if dim == 0:  # and what is recorded is the gradient of those
        total = sum(p.grad.square().sum() for p in sketch.tapped_parameters)
        assert recorded.gram().sum().item() == pytest.approx(total.item(), rel=1e-5)


def test_half_precision_and_a_gradient_that_cancels_are_no_errors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()
    sketch = GradientSketch(model, 16)
    x = torch.randn(1, 9, 64).bfloat16().repeat(2, 1, 1)  # the same row twice, with opposite signs
    with sketch.step(0), sketch.rows(torch.tensor([0, 1])):
        (model(x).float() * torch.tensor([1.0, -1.01])[:, None, None]).sum().backward()
    assert not sketch.exclude_mismatches([p.grad for p in sketch.trainable_parameters])


def test_gradients_that_dont_fit_are_named():
    sketch = GradientSketch(nn.Linear(4, 2), 8)
    with pytest.raises(ValueError, match="no step was opened"):
        sketch.exclude_mismatches([None, None])
    sketch.open(0)
    with pytest.raises(ValueError, match="got 1 gradients for 2 trainable parameters"):
        sketch.exclude_mismatches([None])
    with pytest.raises(ValueError, match=r"the gradient of weight is \(3,\), not \(2, 4\)"):
        sketch.exclude_mismatches([torch.ones(3), None])


def test_a_gradient_that_overflowed_is_not_checked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    sketch = GradientSketch(model, 8)
    with sketch.step(0), sketch.rows(torch.tensor([0, 1])):
        (model(torch.randn(2, 5, 6)) * torch.tensor([1.0, 1e38])[:, None, None] * 1e3).sum().backward()
    gradients = [p.grad for p in sketch.trainable_parameters]
    assert not all(gradient.isfinite().all() for gradient in gradients)
    assert not sketch.exclude_mismatches(gradients)
    assert len(sketch.tapped_parameters) == 4
