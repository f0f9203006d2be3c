"""GradientRecorder in a training loop of plain torch, against gradients taken one sequence at a time."""

import pytest
import torch
from torch import nn

from grpo_kernels.interference import GradientRecorder


class Regression(nn.Module):
    """Rows of T positions, each sequence's loss the sum over them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


PROMPT_B = torch.tensor([3, 3, 8, 8, 5, 5])


def recorded_step(dim):
    """Two micro-batches of one optimizer step; and the inner products of gradients taken one by one."""
    model, x = Regression(), torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1))
    recorder = GradientRecorder(model, dim)
    with recorder.step(seed=7) as gradients:
        for rows in (slice(0, 4), slice(4, 6)):
            with gradients.rows(PROMPT_B[rows]):
                model(x[rows]).sin().sum().backward()
        with pytest.raises(ValueError, match="the step is still open"):
            gradients.inner_products()
    wrong = gradients.check_gradients()
    own = []
    for row in x:
        model.zero_grad()
        model(row[None]).sin().sum().backward()
        own.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    own = torch.stack(own).double()
    return model, gradients, wrong, own @ own.T


def test_inner_products_are_those_of_separate_backward_passes():
    model, gradients, wrong, expected = recorded_step(dim=0)
    torch.testing.assert_close(gradients.inner_products(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(gradients.prompt_ids, PROMPT_B) and not wrong and gradients.sketch_rmse() == 0.0
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sketch_has_inner_products_within_its_predicted_error():
    _, gradients, wrong, expected = recorded_step(dim=32)
    sums = torch.stack([(PROMPT_B == prompt).double() for prompt in (3, 5, 8)])

    def cosines(gram_BB):
        gram_PP = sums @ gram_BB @ sums.T
        return gram_PP / gram_PP.diagonal().sqrt() / gram_PP.diagonal().sqrt()[:, None]

    error = (cosines(gradients.inner_products()) - cosines(expected)).abs().max()
    assert not wrong and 0 < gradients.sketch_rmse() < 0.1 and float(error) < 5 * gradients.sketch_rmse() + 0.05


def test_metrics_of_a_step():
    _, gradients, _, expected = recorded_step(dim=0)
    metrics = gradients.metrics(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.5]))
    groups = gradients.by_prompt(torch.zeros(6))
    assert metrics["interference/live_prompts"] == 3
    assert float(groups.gram_PP.sum()) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_a_parameter_that_no_tap_records_is_named():
    model, x = Regression(), torch.randn(2, 4, 6)
    recorder = GradientRecorder(model, dim=8)
    with recorder.step(seed=0) as gradients, gradients.rows(torch.tensor([0, 1])):
        hidden = nn.functional.linear(x, model.first.weight, model.first.bias)  # past the layer's forward
        model.second(hidden).sum().backward()
    assert set(gradients.check_gradients()) == {"first.weight", "first.bias"}


@pytest.mark.parametrize("seed", ["3", 1.5, True])
def test_a_seed_that_is_no_whole_number_is_named(seed):
    with (
        pytest.raises(ValueError, match=f"seed={seed!r} must be a whole number"),
        GradientRecorder(Regression()).step(seed),
    ):
        pass
