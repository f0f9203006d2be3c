"""From hidden states and advantages (or rewards) to the GRPO loss and its gradients, in one pass over tiles of logits.

Shapes: N live tokens, C tokens of a tile, B sequences, G completions of one prompt, H hidden, V vocabulary.

dL/dlogits of a row needs its log-sum-exp and one number, dL/dlogprob, which for losses on single tokens is known as
soon as the row's log-prob is. So each tile is made once and turned into its own gradient: 2 N V H for the logits, 2 f
for dL/dhidden and, with a trainable weight, 2 f for dL/dweight, where f is the share of rows whose dL/dlogprob isn't
zero. Flow of this file: checks, the order of the rows (those that can have a gradient first), then for each tile
products -> row arithmetic (``rows/plain.py``, ``rows/triton_rows.py``) -> products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.backend import choose_backend
from grpo_kernels.head.rows.plain import Transform, grpo_rows_
from grpo_kernels.memory import cast, scaled

from .checks import check_head, check_number, usable_sketch
from .derivatives import first_derivatives, own_precision
from .loss_checks import GivenAdvantages, check_loss_options, read_tokens
from .products import HeadProducts, HeadSketch, compute_dtype
from .token_losses import TokenInputs, TokenLoss


@dataclass
class GRPOLoss:
    """``loss`` is differentiable, 0-d; all else is detached, float32 (float64 for float64).

    Attributes:
        loss: what to call ``backward`` on.
        policy_loss: 0-d, the loss without the entropy bonus.
        logprobs, entropies: (N,), in nats.
        ratio: (N,), exp(logprob - old logprob); 1 on policy.
        clipped: (N,) bool, whether the clip is what the gradient is missing for.
        kl: (N,), or None where no reference log-probs were given; times the ratio with ``kl_times_ratio``.
        advantages: (N,), of each token.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor | None
    advantages: torch.Tensor


@dataclass(frozen=True)
class LossCall:
    """What a call is made of, besides the tensors that have gradients. ``entropy_grad``: the weight of a token's
    entropy, which is subtracted from the loss."""

    product_dtype: torch.dtype
    tokens: TokenInputs
    transform: Transform
    options: TokenLoss
    entropy_grad: float
    sketch: HeadSketch | None


class LinearGRPOLossFunction(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx, call, grad_enabled, hidden, weight, bias, low_inputs, low_weight):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[2:]]
        factors = [(hidden, weight)] + ([(low_inputs, low_weight)] if low_inputs is not None else [])
        n_live, order = _live_rows_first(call) if any(needs) else (0, None)
        products = HeadProducts(
            factors,
            call.product_dtype,
            want_inputs=[needs[0], needs[3]][: len(factors)],
            want_weights=[needs[1], needs[4]][: len(factors)],
            want_bias=needs[2],
            gradient_rows=n_live,
            sketch=call.sketch,
        )
        logs = _run_tiles(call, products, bias, order, n_live)
        products.release()
        policy_loss = logs["loss"].sum()
        loss = policy_loss - call.entropy_grad * logs["entropy"].sum() if call.entropy_grad else policy_loss.clone()

        bias_grad = products.bias_grad
        if needs[2] and bias_grad is None:
            bias_grad = torch.zeros_like(bias, dtype=products.sum_dtype)
        (head, *rest), weight_grads = products.factors, [*products.weight_grads(), None]
        low = rest[0] if rest else None
        ctx.units = [None, head.weight_unit, None, None, low and low.weight_unit]
        ctx.totals = [head.inputs_grad, weight_grads[0], bias_grad, low and low.inputs_grad, weight_grads[1]]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, low_inputs, low_weight)]
        ctx.sketch, ctx.projected = call.sketch, products.projected
        details = (policy_loss, *(logs[name] for name in ("logprob", "entropy", "ratio", "clipped", "kl", "advantage")))
        ctx.mark_non_differentiable(*details)
        return (loss, *details)

    @staticmethod
    @first_derivatives
    def backward(ctx, loss_grad, *_):
        if ctx.totals is None:
            raise RuntimeError("the backward of linear_grpo_loss was called before, without retain_graph")
        totals = ctx.totals
        if torch._C._autograd._get_current_graph_task_keep_graph():
            totals = [None if total is None else total.clone() for total in totals]
        else:
            ctx.totals = None  # scaled in place and handed over
        if ctx.sketch is not None and ctx.projected is not None:
            with ctx.sketch.guarded():
                ctx.sketch.add(ctx.projected * loss_grad)
        # times 1 is a pass over (V, H) for nothing; to look is free on a CPU, and would wait for a GPU
        is_one = loss_grad.device.type == "cpu" and loss_grad.item() == 1.0

        def finish(total, unit, dtype):
            if total is None or (is_one and unit is None):
                return None if total is None else cast(total, dtype)
            return scaled(total, loss_grad if unit is None else loss_grad * unit, dtype)

        grads = [finish(*one) for one in zip(totals, ctx.units, ctx.dtypes, strict=True)]
        return (None, None, *grads)


def _live_rows_first(call: LossCall) -> tuple[int, torch.Tensor | None]:
    """How many rows can have a gradient, and the order in which they come first (None: as they are), so that their
    tiles are full and the others' need no gradient."""
    live_N = call.tokens.may_be_live(call.options, call.entropy_grad)
    n_live = int(live_N.sum())
    if n_live in (0, len(live_N)):
        return n_live, None
    return n_live, torch.argsort(live_N.to(torch.int8), descending=True, stable=True)


def _run_tiles(
    call: LossCall, products: HeadProducts, bias: torch.Tensor | None, order: torch.Tensor | None, n_live: int
) -> dict[str, torch.Tensor]:
    """Runs every tile: its logits, its row arithmetic, its gradients. Returns what is logged, (N,) by name."""
    tokens, dtype = call.tokens, products.sum_dtype
    count, device = len(tokens.targets), tokens.targets.device
    row_function = _row_function(device, dtype)
    if row_function is grpo_rows_:
        tokens.advantages = tokens.made_advantages()
    logs: dict[str, torch.Tensor] = {}
    for gradient, start, stop in ((True, 0, n_live), (False, n_live, count)):
        for rows in products.tiles(order, start, stop):
            row_logs, tile, factor_C = row_function(
                products.logits(rows),
                rows,
                tokens,
                call.transform,
                bias=bias,
                options=call.options,
                entropy_grad=call.entropy_grad,
                gradient=gradient,
                dtype=products.dtype,
            )
            _keep(logs, row_logs, rows, count)
            if gradient:
                if tokens.old is not None:
                    tile, rows, factor_C = _drop_clipped_rows(tile, rows, factor_C)
                products.accumulate(tile, rows, factor_C)
    if not count:
        logs = {name: torch.zeros(0, dtype=dtype, device=device) for name in LOGGED}
        logs["clipped"] = torch.zeros(0, dtype=torch.bool, device=device)
    logs.setdefault("kl", torch.zeros_like(logs["logprob"]))
    return logs


LOGGED = ("logprob", "entropy", "loss", "ratio", "advantage")  # and clipped, of bool; kl, where there is a reference


def _keep(
    logs: dict[str, torch.Tensor], of_tile: dict[str, torch.Tensor], rows: torch.Tensor | slice, count: int
) -> None:
    """What is logged of a tile's rows, into (count,) of each name; a tile of all rows in order is that already."""
    whole = isinstance(rows, slice) and rows == slice(0, count)
    for name, values in of_tile.items():
        if whole:
            logs[name] = values
            continue
        if name not in logs:
            logs[name] = values.new_empty(count)  # the tiles have every row
        logs[name][rows] = values


def _row_function(device: torch.device, dtype: torch.dtype) -> Any:
    """``grpo_rows_`` of the backend for this device; Triton's arithmetic is float32, so float64 stays with torch."""
    if dtype == torch.float32 and choose_backend(device) == "triton":
        from grpo_kernels.head.rows.triton_rows import grpo_rows_ as fused

        return fused
    return grpo_rows_


def _drop_clipped_rows(tile, rows, factor_C):
    """The rows that kept a gradient where a clip took some: moved to the front of the tile, in place."""
    live_C = factor_C != 0
    count = int(live_C.sum())
    if count == len(factor_C):
        return tile, rows, factor_C
    position = torch.arange(len(factor_C), device=tile.device)
    numbers = position + rows.start if isinstance(rows, slice) else rows.clone()
    holes = position[~live_C & (position < count)]
    movers = position[live_C & (position >= count)]
    for values in (tile, numbers, factor_C):
        values[holes] = values[movers]
    return tile[:count], numbers[:count], factor_C[:count]


@torch.compiler.disable
def linear_grpo_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    sequence_N: torch.Tensor,
    advantages: torch.Tensor | None,
    weights_B: torch.Tensor,
    *,
    advantages_N: torch.Tensor | None = None,
    rewards: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalization: tuple[str, Mapping[str, float]] | None = None,
    old_logprobs_N: torch.Tensor | None = None,
    ref_logprobs_N: torch.Tensor | None = None,
    policy_scale_N: torch.Tensor | None = None,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    beta: float = 0.0,
    kl_times_ratio: bool = True,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    head_sketch: HeadSketch | None = None,
) -> GRPOLoss:
    """The GRPO loss of N tokens and its gradients by hidden states and head, without the (N, V) logits.

    The same in plain torch, at full memory, for ``loss_type="grpo"``::

        logprobs, entropies = linear_logprob(hidden_NH, weight_VH, targets_N, entropy=True)
        ratio = (logprobs - (logprobs.detach() if old_logprobs_N is None else old_logprobs_N)).exp()
        A, w = advantages[sequence_N], weights_B[sequence_N]
        policy = -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A) * policy_scale_N
        k3 = (ref_logprobs_N - logprobs).exp() - (ref_logprobs_N - logprobs) - 1
        loss = (w * (policy + beta * k3 * ratio)).sum() - entropy_coef * entropies.mean()

    The gradients are made in the forward, and ``backward`` scales them. A token whose dL/dlogprob
    is zero (advantage or weight 0 with neither beta nor entropy_coef; clipped) gets log-prob and entropy, and no part
    in the gradients' products.

    Args:
        hidden_NH: (N, H), live completion tokens only, float32, bfloat16, float16 or float64. N may be 0.
        weight_VH: (V, H).
        targets_N: (N,), the tokens that were sampled, in [0, V).
        sequence_N: (N,) integers, the sequence each token is of, in [0, B).
        advantages: (B,) of each sequence, or (N,) of each token (where B = N, of each sequence).
        advantages_N: instead, (N,) of each token.
        weights_B: (B,), the weight of one token of each sequence: grpo and sapo 1 / (B len), bnpo 1 / N, dr_grpo
            1 / (B max_len), dapo and cispo 1 / tokens of the global batch, luspo 1 / B. A division by gradient
            accumulation steps goes into it.
        rewards: instead of advantages: ((B, G) the rewards of each sequence's whole group, (B,) its place there). The
            Triton backend makes baseline, scale and gradient in the same launch.
        normalization: with ``rewards``, (method, options) as ``normalize_rewards`` takes them; default std. Methods
            that need the whole batch can't be used here.
        old_logprobs_N: (N,) of the policy that is compared with; None on policy, where every ratio is 1.
        ref_logprobs_N: (N,) of the reference model, for KL.
        policy_scale_N: (N,), multiplies the policy term and not KL (vLLM's importance correction).
        loss_type: grpo, bnpo, dr_grpo, dapo, luspo (token-level): the clipped surrogate; cispo; sapo. TRL's semantics.
        epsilon: clip range, 1 - epsilon to 1 + epsilon_high.
        epsilon_high: default epsilon. For cispo the ratio is capped at epsilon_high itself.
        delta: caps the ratio from above also where that lowers the loss (dual clip), clipped surrogate only.
        sapo_temperatures: for positive and for other advantages.
        beta: weight of KL. With ``kl_times_ratio`` (TRL's default) KL is multiplied by the ratio, gradient included.
        entropy_coef: weight of the mean entropy of the N tokens, which is subtracted.
        temperature: as in ``linear_logprob``, and so are bias, low_rank, logit_scale, softcap and head_sketch.

    Returns:
        ``GRPOLoss``.

    Raises:
        ValueError: shapes, devices or dtypes that don't fit, targets outside the vocabulary, an unknown loss type,
            numbers out of range, rewards together with advantages or neither.

    Source:
        GRPO, arXiv 2402.03300; Dr. GRPO, 2503.20783; DAPO, 2503.14476; CISPO, 2506.13585; SAPO, 2511.20347.
    """
    check_head(hidden_NH, weight_VH, targets_N, bias, low_rank, temperature, logit_scale, softcap)
    if hidden_NH.ndim != 2:
        raise ValueError(f"hidden_NH has shape {tuple(hidden_NH.shape)}: expected (N, H)")
    options = check_loss_options(
        loss_type=loss_type,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        sapo_temperatures=sapo_temperatures,
        beta=beta,
        kl_times_ratio=kl_times_ratio,
    )
    if beta and ref_logprobs_N is None:
        raise ValueError(f"beta={beta!r} needs ref_logprobs_N")
    check_number("entropy_coef", entropy_coef)
    given = GivenAdvantages(advantages, advantages_N, rewards, normalization)
    per_token = {"old_logprobs_N": old_logprobs_N, "ref_logprobs_N": ref_logprobs_N, "policy_scale_N": policy_scale_N}
    call = LossCall(
        compute_dtype(hidden_NH),
        read_tokens(targets_N, sequence_N, weights_B, given, per_token, len(weight_VH)),
        Transform(float(temperature), float(logit_scale), softcap),
        options,
        entropy_coef / max(len(hidden_NH), 1),
        usable_sketch(head_sketch, weight_VH),
    )
    loss, policy_loss, logprobs, entropies, ratio, clipped, kl, made_advantages_N = LinearGRPOLossFunction.apply(
        call, torch.is_grad_enabled(), hidden_NH, weight_VH, bias, *((None, None) if low_rank is None else low_rank)
    )
    kl = kl if ref_logprobs_N is not None else None
    return GRPOLoss(loss, policy_loss, logprobs, entropies, ratio, clipped, kl, made_advantages_N)
