"""Inputs of the fused head, the same loss in plain torch, and the rule that compares the two."""

import math

import torch
from reference import grpo_loss, head_logprobs

from grpo_kernels import linear_grpo_loss

EPS = {torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3, torch.float16: 9.8e-4, torch.float64: 2.3e-16}
OFF_POLICY = {
    "clip": {},
    "wide clip": {"epsilon": 0.1, "epsilon_high": 0.4},
    "delta": {"delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo", "sapo_temperatures": (0.8, 1.2)},
    "kl": {"beta": 0.1},
    "plain kl": {"beta": 0.1, "kl_times_ratio": False},
    "entropy": {"entropy_coef": 0.3},
    "all": {"beta": 0.05, "entropy_coef": 0.1, "delta": 1.8, "epsilon_high": 0.3},
}


def example(n=24, h=8, v=37, b=4, *, dtype=torch.float64, seed=0, scale=1.0, spread=0.3):
    """Inputs of a loss with both clipped and unclipped tokens, a dead sequence, and a weight of its own each."""
    torch.manual_seed(seed)
    tensors = {
        "hidden": torch.randn(n, h, dtype=torch.float64),
        "weight": scale * torch.randn(v, h, dtype=torch.float64),
        "bias": torch.randn(v, dtype=torch.float64),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    targets = torch.randint(v, (n,))
    targets[: min(n, 2)] = torch.tensor([0, v - 1])[: min(n, 2)]
    sequence = torch.arange(n) % b
    advantages = torch.randn(b, dtype=torch.float64)
    if b > 1:
        advantages[1] = 0
    with torch.no_grad():
        logprobs, _ = head_logprobs(
            tensors["hidden"].double(), tensors["weight"].double(), targets, bias=tensors["bias"].double()
        )
    data = {
        "targets": targets,
        "sequence": sequence,
        "advantages": advantages,
        "weights": torch.rand(b, dtype=torch.float64) / max(n, 1),
        "old": logprobs + spread * torch.randn(n, dtype=torch.float64),
        "ref": logprobs + spread * torch.randn(n, dtype=torch.float64),
        "scale": torch.rand(n, dtype=torch.float64) + 0.5,
    }
    return tensors, data


def per_token(data, options, *, off_policy=True, scaled=False):
    return {
        "old_logprobs_N": data["old"] if off_policy else None,
        "ref_logprobs_N": data["ref"] if options.get("beta") else None,
        "policy_scale_N": data["scale"] if scaled else None,
    }


def ours(tensors, data, options, head, **extra):
    given = per_token(data, options, **extra)
    given = {name: None if x is None else x.float() for name, x in given.items()}
    if tensors["hidden"].dtype == torch.float64:
        given = per_token(data, options, **extra)
    return linear_grpo_loss(
        tensors["hidden"],
        tensors["weight"],
        data["targets"],
        data["sequence"],
        data["advantages"],
        data["weights"],
        bias=tensors.get("bias"),
        **given,
        **options,
        **head,
    )


def plain(tensors, data, options, head, dtype, **extra):
    """Plain torch in this dtype: (loss, log-probs, entropies, gradients)."""
    tensors = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    work = torch.promote_types(dtype, torch.float32)
    logprobs, entropies = head_logprobs(
        tensors["hidden"], tensors["weight"], data["targets"], bias=tensors.get("bias"), **head
    )
    given = per_token(data, options, **extra)
    names = {"old_logprobs_N": "old_logprobs", "ref_logprobs_N": "ref_logprobs", "policy_scale_N": "policy_scale"}
    given = {names[name]: None if x is None else x.to(work) for name, x in given.items()}
    loss = grpo_loss(
        logprobs.to(work),
        entropies.to(work),
        data["sequence"],
        data["advantages"].to(work),
        data["weights"].to(work),
        **given,
        **options,
    )
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return loss, logprobs, entropies, dict(zip(tensors, gradients, strict=True))


def distance(value, truth) -> float:
    return (value.double() - truth.double()).norm().item()


def assert_no_worse(value, same_dtype, truth, eps, name, slack=2.0, floor=0.0):
    """Our error is no more than plain torch's in the same dtype, up to a factor, plus a few roundings of the result."""
    ours_error, plain_error = distance(value, truth), distance(same_dtype, truth)
    assert math.isfinite(ours_error), name
    allowed = slack * plain_error + 4 * eps * truth.double().norm().item() + floor
    assert ours_error <= allowed, f"{name}: {ours_error:.3g} > {allowed:.3g} (plain torch {plain_error:.3g})"
