"""Computes the tiles of ``linear_logprob``.

Shapes: N tokens, C tokens of a tile, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from grpo_kernels.backend import choose_backend
from grpo_kernels.head.rows.plain import Transform, logit_gradient_, softmax_rows_
from grpo_kernels.memory import cast, scaled

from .products import HeadProducts, HeadSketch

Factors = list[tuple[torch.Tensor, torch.Tensor]]
Operands = Sequence[Any]  # hidden, weight, bias, the adapter's inputs and weight; the last three may be None


def row_functions(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the backend's (softmax_rows_, logit_gradient_). Triton's row arithmetic is in float32 only."""
    if dtype == torch.float32 and choose_backend(device) == "triton":
        from grpo_kernels.head.rows.triton_rows import logit_gradient_ as gradient
        from grpo_kernels.head.rows.triton_rows import softmax_rows_ as softmax

        return softmax, gradient
    return softmax_rows_, logit_gradient_


class LogprobCall(NamedTuple):
    """The arguments of ``linear_logprob`` except the operands. ``dtype`` is that of the products."""

    dtype: torch.dtype
    transform: Transform
    want_entropy: bool
    float32_logits: bool


def _factors(operands: Operands) -> Factors:
    hidden, weight, _, low_inputs, low_weight = operands
    return [(hidden, weight)] + ([] if low_inputs is None or low_weight is None else [(low_inputs, low_weight)])


def is_frozen(needs: Sequence[bool]) -> bool:
    """Returns whether only hidden states (and LoRA's inputs) have a gradient: a multiple of d logprob / d hidden."""
    return (needs[0] or needs[3]) and not (needs[1] or needs[2] or needs[4])


def run_logprob(
    call: LogprobCall, needs: Sequence[bool], targets: torch.Tensor, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None] | None]:
    """Computes log-probs, entropies, and with a frozen head d logprob / d inputs of each factor."""
    hidden, bias, factors = operands[0], operands[2], _factors(operands)
    softmax, gradient = row_functions(hidden.device, torch.promote_types(call.dtype, torch.float32))
    keep = is_frozen(needs)
    products = HeadProducts(
        factors,
        call.dtype,
        want_inputs=[keep and need for need in (needs[0], needs[3])][: len(factors)],
        want_weights=[False] * len(factors),
        gradient_rows=hidden.shape[0] if keep else 0,
        float32_logits=call.float32_logits,
    )
    logprobs_N = torch.empty(hidden.shape[0], dtype=products.sum_dtype, device=hidden.device)
    entropies_N = torch.empty_like(logprobs_N) if call.want_entropy else None

    def statistics_of(tile, rows):
        statistics = softmax(tile, targets[rows], call.transform, bias=bias, entropy=call.want_entropy, keep=keep)
        logprobs_N[rows] = statistics.logprob
        if entropies_N is not None:
            entropies_N[rows] = statistics.entropy
        return statistics

    def row_pass(tile, rows, kept):
        statistics = statistics_of(tile, rows)
        ones = torch.ones_like(statistics.logprob)
        options = {"bias": bias, "dtype": products.dtype, "out": kept}
        return gradient(tile, targets[rows], statistics, call.transform, ones, None, **options)

    products.run_windows(None, row_pass)
    for rows in itertools.starmap(slice, products.plan.rest):
        statistics_of(products.logits(rows), rows)
    products.release()
    return logprobs_N, entropies_N, [factor.inputs_grad for factor in products.factors] if keep else None


def scale_kept(
    kept: Sequence[torch.Tensor | None], logprob_grad_N: torch.Tensor | None, operands: Operands
) -> list[torch.Tensor | None]:
    """Returns the operands' gradients of a frozen head, from d logprob / d inputs."""
    inputs = [
        None
        if one is None or like is None or logprob_grad_N is None
        else (one * logprob_grad_N[:, None]).to(like.dtype)
        for one, like in zip([*kept, None][:2], (operands[0], operands[3]), strict=True)
    ]
    return [inputs[0], None, None, inputs[1], None]


def recompute(
    call: LogprobCall,
    needs: Sequence[bool],
    targets: torch.Tensor,
    operands: Operands,
    logprob_grad_N: torch.Tensor | None,
    entropy_grad_N: torch.Tensor | None,
    sketch: HeadSketch | None = None,
) -> list[torch.Tensor | None]:
    """Returns the operands' gradients. It recomputes the tiles of the rows that have an upstream gradient."""
    products = _recompute_tiles(call, needs, targets, operands, logprob_grad_N, entropy_grad_N, sketch)
    if sketch is not None and products.projected is not None:
        with sketch.guarded():
            sketch.add(products.projected)
    bias, bias_grad = operands[2], products.bias_grad
    if bias is not None and needs[2] and bias_grad is None:
        bias_grad = torch.zeros_like(bias, dtype=products.sum_dtype)
    (head, *rest), weight_grads = products.factors, [*products.weight_grads(), None]
    low = rest[0] if rest else None
    totals: list[Any] = [head.inputs_grad, weight_grads[0], bias_grad, low and low.inputs_grad, weight_grads[1]]
    units: list[Any] = [None, head.weight_unit, None, None, low and low.weight_unit]
    return [_in_dtype(*one) for one in zip(totals, operands, units, strict=True)]


def _in_dtype(total: torch.Tensor | None, like: Any, unit: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a gradient in the dtype of ``like``, multiplied by its unit."""
    if total is None:
        return None
    return cast(total, like.dtype) if unit is None else scaled(total, unit, like.dtype)


def _recompute_tiles(
    call: LogprobCall,
    needs: Sequence[bool],
    targets: torch.Tensor,
    operands: Operands,
    logprob_grad_N: torch.Tensor | None,
    entropy_grad_N: torch.Tensor | None,
    sketch: HeadSketch | None,
) -> HeadProducts:
    """Recomputes the tiles of the rows that have an upstream gradient, and sums their gradients."""
    hidden, bias, factors = operands[0], operands[2], _factors(operands)
    live_N = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for upstream in (logprob_grad_N, entropy_grad_N):
        if upstream is not None:
            live_N |= upstream != 0
    order = live_N.nonzero().squeeze(1)
    softmax, gradient = row_functions(hidden.device, torch.promote_types(call.dtype, torch.float32))
    products = HeadProducts(
        factors,
        call.dtype,
        want_inputs=[needs[0], needs[3]][: len(factors)],
        want_weights=[needs[1], needs[4]][: len(factors)],
        want_bias=needs[2],
        gradient_rows=len(order),
        sketch=sketch,
        float32_logits=call.float32_logits,
    )

    def row_pass(tile, rows, kept):
        wanted = entropy_grad_N is not None
        statistics = softmax(tile, targets[rows], call.transform, bias=bias, entropy=wanted, keep=True)
        logprob_grad = torch.zeros_like(statistics.logprob) if logprob_grad_N is None else logprob_grad_N[rows]
        entropy_grad = None if entropy_grad_N is None else entropy_grad_N[rows]
        upstream = (call.transform, logprob_grad, entropy_grad)
        return gradient(tile, targets[rows], statistics, *upstream, bias=bias, dtype=products.dtype, out=kept)

    products.run_windows(order, row_pass)
    products.release()
    return products
