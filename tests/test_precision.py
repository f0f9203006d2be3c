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


@pytest.mark.parametrize("n_vocabulary", [1, 2, 257])
def test_a_softcap_in_bfloat16_has_consistent_shares(n_vocabulary):
    """tanh is kept in bfloat16. Of one token the entropy has no gradient at all; of more, the error is that of rounding
    the tanh, not that of shares which don't add up to 1."""
    hidden_NH, weight_VH, _ = problem()
    weight_VH, targets_N = weight_VH[:n_vocabulary], torch.arange(N) % n_vocabulary

    def gradient(dtype, entropies_alone):
        hidden = hidden_NH.clone().to(dtype).detach().requires_grad_()
        logprobs_N, entropies_N = linear_logprob(hidden, weight_VH.to(dtype), targets_N, softcap=5.0, entropy=True)
        (entropies_N.sum() if entropies_alone else logprobs_N.sum() + entropies_N.sum()).backward()
        return hidden.grad.double()

    if n_vocabulary == 1:
        assert gradient(torch.bfloat16, True).abs().max() == 0
    for alone in (True, False):
        truth, found = gradient(torch.float64, alone), gradient(torch.bfloat16, alone)
        assert (found - truth).norm() <= 0.02 * truth.norm() + 1e-6
