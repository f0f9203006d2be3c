"""Sums of the head stay in float32 under autocast, and what it can't differentiate it refuses."""

import pytest
import torch

from grpo_kernels import linear_grpo_loss, linear_logprob

N, H, V = 24, 32, 257


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator).bfloat16()
    weight_VH = (torch.randn(V, H, generator=generator) * 0.4).bfloat16()
    return hidden_NH, weight_VH, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_autocast_changes_the_products_alone(softcap, inside):
    """With bfloat16 inputs autocast has nothing left to cast: every number is the one without it."""
    hidden_NH, weight_VH, targets_N = problem()
    bias = torch.linspace(-1, 1, V)
    sequence_N, advantages_B = torch.arange(N) // 6, torch.tensor([1.0, -0.5, 0.7, -1.2])

    def run(autocast):
        found = []
        hidden, weight, b = (x.clone().requires_grad_() for x in (hidden_NH, weight_VH, bias))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logprobs_N, entropies_N = linear_logprob(hidden, weight, targets_N, bias=b, softcap=softcap, entropy=True)
            out = linear_grpo_loss(
                hidden, weight, targets_N, sequence_N, advantages_B, torch.full((4,), 1 / N),
                bias=b, softcap=softcap, entropy_coef=0.1,
            )  # fmt: skip
            total = logprobs_N.sum() + entropies_N.square().sum() + out.loss
            if inside:
                total.backward()
        if not inside:
            total.backward()
        found += [logprobs_N, entropies_N, out.logprobs, out.entropies, out.loss, hidden.grad, weight.grad, b.grad]
        return found

    for plain, mixed in zip(run(False), run(True), strict=True):
        assert plain.dtype == mixed.dtype
        torch.testing.assert_close(mixed, plain, rtol=0, atol=0)


def test_second_derivatives_are_refused():
    hidden_NH, weight_VH, targets_N = problem()
    hidden = hidden_NH.float().requires_grad_()
    logprobs_N = linear_logprob(hidden, weight_VH.float(), targets_N)
    with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
        torch.autograd.grad(logprobs_N.sum(), hidden, create_graph=True)
    loss = linear_grpo_loss(
        hidden, weight_VH.float(), targets_N, torch.arange(N) // 6, torch.randn(4), torch.ones(4)
    ).loss
    with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
