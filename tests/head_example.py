"""Inputs of the fused head, the same loss in plain torch, and the rule that compares the two."""

import math
from typing import NamedTuple

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
    logprobs = double_logprobs(tensors, targets)
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


@torch.no_grad()
def double_logprobs(tensors, targets):
    hidden, weight, bias = (tensors[name].double() for name in ("hidden", "weight", "bias"))
    return head_logprobs(hidden, weight, targets, bias=bias)[0]


def per_token(data, options, *, off_policy=True, scaled=False):
    return {
        "old_logprobs_N": data["old"] if off_policy else None,
        "ref_logprobs_N": data["ref"] if options.get("beta") else None,
        "policy_scale_N": data["scale"] if scaled else None,
    }


def token_arguments(tensors, data):
    """The first four arguments of ``linear_grpo_loss``."""
    return tensors["hidden"], tensors["weight"], data["targets"], data["sequence"]


def ours(tensors, data, options=None, head=None, **extra):
    options, work = options or {}, torch.promote_types(tensors["hidden"].dtype, torch.float32)
    given = {name: None if x is None else x.to(work) for name, x in per_token(data, options, **extra).items()}
    given |= {"bias": tensors.get("bias"), **options, **(head or {})}
    return linear_grpo_loss(*token_arguments(tensors, data), data["advantages"], data["weights"], **given)


def gradients_of(loss, tensors):
    """By name; None for a tensor that the loss doesn't depend on."""
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()), allow_unused=True), strict=True))


def our_gradients(tensors, data, *options, **extra):
    return gradients_of(ours(tensors, data, *options, **extra).loss, tensors)


class Plain(NamedTuple):
    loss: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor
    gradients: dict[str, torch.Tensor]


def plain(tensors, data, options=None, head=None, *, dtype=torch.float64, **extra):
    """The same in plain torch, in this dtype."""
    options, work = options or {}, torch.promote_types(dtype, torch.float32)
    tensors = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    *arguments, sequence = token_arguments(tensors, data)
    logprobs, entropies = head_logprobs(*arguments, bias=tensors.get("bias"), **(head or {}))
    per_sequence = (data[name].to(work) for name in ("advantages", "weights"))
    given = per_token(data, options, **extra)
    given = {name.removesuffix("_N"): None if x is None else x.to(work) for name, x in given.items()}
    loss = grpo_loss(logprobs.to(work), entropies.to(work), sequence, *per_sequence, **given, **options)
    return Plain(loss, logprobs, entropies, gradients_of(loss, tensors))


def distance(value, truth) -> float:
    return (value.double() - truth.double()).norm().item()


def assert_no_worse(value, same_dtype, truth, eps, name, slack=2.0, floor=0.0):
    """Our error is no more than plain torch's in the same dtype, up to a factor, plus a few roundings of the result."""
    ours_error, plain_error = distance(value, truth), distance(same_dtype, truth)
    assert math.isfinite(ours_error), name
    allowed = slack * plain_error + 4 * eps * truth.double().norm().item() + floor
    assert ours_error <= allowed, f"{name}: {ours_error:.3g} > {allowed:.3g} (plain torch {plain_error:.3g})"


def assert_gradients_no_worse(found, same_dtype, truth, eps, slack=2.0):
    """Of every gradient: as ``assert_no_worse``."""
    for name, gradient in found.items():
        assert_no_worse(gradient, same_dtype.gradients[name], truth.gradients[name], eps, name, slack)
