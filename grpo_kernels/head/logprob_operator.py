"""Runs ``linear_logprob`` as operators on tensors and scalars, for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grpo_kernels.head.rows.plain import Transform

from .checks import check_values
from .derivatives import refuse_second_derivatives
from .logprob_tiles import LogprobCall, Operands, is_frozen, recompute, run_logprob, scale_kept

SCALARS = "ScalarType dtype, float temperature, float logit_scale, float? softcap, bool entropy, bool float32_logits"
TENSORS = (
    "bool[] needs, Tensor targets, Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_inputs, Tensor? low_weight"
)


def logprob_in_a_graph(
    call: LogprobCall, targets: torch.Tensor, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls the operator: log-probs, and entropies (empty if not wanted)."""
    grad = torch.is_grad_enabled()
    needs = [grad and operand is not None and operand.requires_grad for operand in operands]
    transform = call.transform
    scalars = (call.dtype, transform.temperature, transform.logit_scale, transform.softcap)
    return logprob_operator(*scalars, call.want_entropy, call.float32_logits, needs, targets, *operands)[:2]


def _unflatten(arguments: Any) -> tuple[LogprobCall, list[bool], torch.Tensor, Any]:
    dtype, temperature, logit_scale, softcap, entropy, float32_logits, needs, targets, *operands = arguments
    return (
        LogprobCall(dtype, Transform(temperature, logit_scale, softcap), entropy, float32_logits),
        needs,
        targets,
        operands,
    )


def _or_empty(tensors: Sequence[torch.Tensor | None], like: torch.Tensor) -> list[torch.Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


@torch.library.custom_op(
    "grpo_kernels::linear_logprob",
    mutates_args=(),
    schema=f"({SCALARS}, {TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def logprob_operator(*arguments):
    """Returns log-probs, entropies, and d logprob / d inputs of both factors; empty if not needed."""
    call, needs, targets, operands = _unflatten(arguments)
    check_values([("targets hold", targets, operands[1].shape[0])])
    with torch.autocast(targets.device.type, enabled=False):
        logprobs_N, entropies_N, kept = run_logprob(call, needs, targets, operands)
    return logprobs_N, *_or_empty([entropies_N, *[*(kept or []), None, None][:2]], logprobs_N)


@logprob_operator.register_fake
def _shapes(*arguments):
    call, needs, targets, operands = _unflatten(arguments)
    logprobs_N = operands[0].new_empty(targets.shape, dtype=torch.promote_types(call.dtype, torch.float32))
    kept = [
        logprobs_N.new_empty(operand.shape) if is_frozen(needs) and need else None
        for operand, need in ((operands[0], needs[0]), (operands[3], needs[3]))
    ]
    return logprobs_N, *_or_empty(
        [logprobs_N.new_empty(targets.shape) if call.want_entropy else None, *kept], logprobs_N
    )


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:], *([] if inputs[4] else [output[1]]))
    ctx.scalars, ctx.needs = inputs[:6], inputs[6]
    ctx.save_for_backward(*inputs[7:], *output[2:])


def _backward(ctx, logprob_grad_N, entropy_grad_N, *_):
    refuse_second_derivatives()
    targets, *operands = ctx.saved_tensors[:-2]
    kept = [
        one if need else None for one, need in zip(ctx.saved_tensors[-2:], (ctx.needs[0], ctx.needs[3]), strict=True)
    ]
    if is_frozen(ctx.needs) and entropy_grad_N is None:
        grads = scale_kept(kept, logprob_grad_N, operands)
    else:
        arguments = (*ctx.scalars, ctx.needs, targets, *operands)
        found = logprob_backward_operator(logprob_grad_N, entropy_grad_N, *arguments)
        grads = [grad if need else None for grad, need in zip(found, ctx.needs, strict=True)]
    return (*8 * [None], *grads)


logprob_operator.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op(
    "grpo_kernels::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor? logprob_grad, Tensor? entropy_grad, {SCALARS}, {TENSORS}) -> ({', '.join(5 * ['Tensor'])})",
)
def logprob_backward_operator(logprob_grad, entropy_grad, *arguments):
    """Returns the operands' gradients, empty where they aren't needed."""
    call, needs, targets, operands = _unflatten(arguments)
    with torch.autocast(targets.device.type, enabled=False):
        grads = recompute(call, needs, targets, operands, logprob_grad, entropy_grad)
    return tuple(_or_empty([grad if need else None for grad, need in zip(grads, needs, strict=True)], operands[0]))


@logprob_backward_operator.register_fake
def _shapes_of_gradients(logprob_grad, entropy_grad, *arguments):
    _, needs, _, operands = _unflatten(arguments)
    found = [torch.empty_like(one) if need else None for one, need in zip(operands, needs, strict=True)]
    return tuple(_or_empty(found, operands[0]))
