"""Computes the loss, its logged values and its gradients for all tiles of logits: what ``linear_grpo_loss`` runs.

Shapes: N live tokens, C tokens of a tile, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.backend import choose_backend
from grpo_kernels.head.rows.plain import Transform, grpo_rows_

from .products import HeadProducts, HeadSketch, pick
from .token_losses import TokenInputs, TokenLoss


@dataclass(frozen=True)
class LossCall:
    """The arguments of a call, except the tensors that have gradients.

    ``entropy_grad`` is the weight of a token's entropy, which is subtracted from the loss.
    """

    product_dtype: torch.dtype
    tokens: TokenInputs
    transform: Transform
    options: TokenLoss
    entropy_grad: float
    sketch: HeadSketch | None
    float32_logits: bool


@dataclass
class LossOutputs:
    """What a call computes before its backward. The gradients are None where they aren't needed.

    Attributes:
        loss, policy_loss: 0-d.
        logs: (N,) by name.
        totals: the gradients by hidden, weight, bias, and the adapter's inputs and weight, in ``sum_dtype``.
        units: 0-d, by which each total must still be multiplied; None: 1.
        projected: for the sketch, (N, k).
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    logs: dict[str, torch.Tensor]
    totals: list[torch.Tensor | None]
    units: list[torch.Tensor | None]
    projected: torch.Tensor | None


Operands = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]  # hidden, weight, bias, the adapter's inputs and weight


def run_loss(call: LossCall, needs: list[bool], operands: Operands) -> LossOutputs:
    """Computes loss and gradients. ``needs``: for each operand, whether its gradient is wanted."""
    hidden, weight, bias, low_inputs, low_weight = operands
    factors = [(hidden, weight)]
    if low_inputs is not None and low_weight is not None:
        factors.append((low_inputs, low_weight))
    n_live, order = _live_rows_first(call) if any(needs) else (0, None)
    products = HeadProducts(
        factors,
        call.product_dtype,
        want_inputs=[needs[0], needs[3]][: len(factors)],
        want_weights=[needs[1], needs[4]][: len(factors)],
        want_bias=needs[2],
        gradient_rows=n_live,
        sketch=call.sketch,
        float32_logits=call.float32_logits,
    )
    logs = _run_tiles(call, products, bias, order, n_live)
    products.release()
    policy_loss = logs["loss"].sum()
    loss = policy_loss - call.entropy_grad * logs["entropy"].sum() if call.entropy_grad else policy_loss.clone()
    bias_grad = products.bias_grad
    if bias is not None and needs[2] and bias_grad is None:
        bias_grad = torch.zeros_like(bias, dtype=products.sum_dtype)
    (head, *rest), weight_grads = products.factors, [*products.weight_grads(), None]
    low = rest[0] if rest else None
    totals: list[Any] = [head.inputs_grad, weight_grads[0], bias_grad, low and low.inputs_grad, weight_grads[1]]
    units: list[Any] = [None, head.weight_unit, None, None, low and low.weight_unit]
    return LossOutputs(loss, policy_loss, logs, totals, units, products.projected)


def _live_rows_first(call: LossCall) -> tuple[int, torch.Tensor | None]:
    """Returns how many rows can have a gradient, and an order of the rows in which they come first.

    The order is None if it doesn't matter.
    """
    live_N = call.tokens.may_be_live(call.options, call.entropy_grad)
    n_live = int(live_N.sum())
    if n_live in (0, len(live_N)):
        return n_live, None
    return n_live, torch.argsort(live_N.to(torch.int8), descending=True, stable=True)


def _run_tiles(
    call: LossCall, products: HeadProducts, bias: torch.Tensor | None, order: torch.Tensor | None, n_live: int
) -> dict[str, torch.Tensor]:
    """Computes logits, row arithmetic and gradients of every tile. Returns values to log, (N,) by name."""
    tokens, dtype = call.tokens, products.sum_dtype
    count, device = len(tokens.targets), tokens.targets.device
    row_function = _row_function(device, dtype)
    if row_function is grpo_rows_:
        tokens.advantages = tokens.token_advantages()
    logs: dict[str, torch.Tensor] = {}

    def row_pass(tile_CV, rows, kept_CV, gradient=True):
        row_logs, tile_CV, factor_C = row_function(
            tile_CV,
            rows,
            tokens,
            call.transform,
            bias=bias,
            options=call.options,
            entropy_grad=call.entropy_grad,
            gradient=gradient,
            dtype=products.dtype,
            out=kept_CV,
        )
        _store(logs, row_logs, rows, count)
        return tile_CV, factor_C

    products.run_windows(order, row_pass, free_of_zero_rows=tokens.old is None)
    # a copy, because Triton compiles the kernel for each alignment of its pointers
    rest = None if order is None else order[n_live:].clone()
    for begin, end in products.plan.rest:
        rows = pick(rest, begin, end)
        row_pass(products.logits(rows), rows, None, gradient=False)
    if not count:
        logs = {name: torch.zeros(0, dtype=dtype, device=device) for name in LOGGED}
        logs["clipped"] = torch.zeros(0, dtype=torch.bool, device=device)
    logs.setdefault("kl", torch.zeros_like(logs["logprob"]))
    return logs


LOGGED = ("logprob", "entropy", "loss", "ratio", "advantage")  # also clipped (bool), and kl with a reference model


def _store(
    logs: dict[str, torch.Tensor], tile_logs: dict[str, torch.Tensor], rows: torch.Tensor | slice, count: int
) -> None:
    """Writes the values of a tile's rows into ``logs``, (count,) by name; a single tile's are used without a copy."""
    only_tile = isinstance(rows, slice) and rows == slice(0, count)
    for name, values in tile_logs.items():
        if only_tile:
            logs[name] = values
            continue
        if name not in logs:
            logs[name] = values.new_empty(count)  # the tiles together write every row
        logs[name][rows] = values


def _row_function(device: torch.device, dtype: torch.dtype) -> Any:
    """Returns the backend's ``grpo_rows_``. Triton's row arithmetic is in float32, so float64 runs in torch."""
    if dtype == torch.float32 and choose_backend(device) == "triton":
        from grpo_kernels.head.rows.triton_rows import grpo_rows_ as fused

        return fused
    return grpo_rows_
