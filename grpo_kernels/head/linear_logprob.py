"""Computes log-probs and entropies of tokens from hidden states, without the (N, V) logits, for any loss on them.

Shapes: N tokens, C tokens of a tile, H hidden, V vocabulary.

The forward costs 2 N V H operations. With a frozen weight it also computes d logprob / d hidden, (N, H), at another
2 N V H, and the backward only scales its rows. With a trainable weight the backward recomputes the tiles of the rows
whose upstream gradient isn't zero, a share f: (2 + 6 f) N V H in all.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from grpo_kernels.backend import choose_backend
from grpo_kernels.head.rows.plain import Transform, logit_gradient_, softmax_rows_
from grpo_kernels.memory import cast, scaled

from .checks import check_flag, check_head, check_values, usable_sketch
from .derivatives import once_differentiated, without_autocast
from .products import HeadProducts, HeadSketch, compute_dtype

Factors = list[tuple[torch.Tensor, torch.Tensor]]


def row_functions(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the backend's (softmax_rows_, logit_gradient_). Triton's row arithmetic is in float32 only."""
    if dtype == torch.float32 and choose_backend(device) == "triton":
        from grpo_kernels.head.rows.triton_rows import logit_gradient_ as gradient
        from grpo_kernels.head.rows.triton_rows import softmax_rows_ as softmax

        return softmax, gradient
    return softmax_rows_, logit_gradient_


class LinearLogprobFunction(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx,
        dtype,
        targets,
        transform,
        want_entropy,
        grad_enabled,
        sketch,
        float32_logits,
        hidden,
        weight,
        bias,
        low_inputs,
        low_weight,
    ):
        ctx.set_materialize_grads(False)
        factors: Factors = [(hidden, weight)] + ([(low_inputs, low_weight)] if low_inputs is not None else [])
        softmax, gradient = row_functions(hidden.device, torch.promote_types(dtype, torch.float32))
        hidden_needs, weight_needs, bias_needs, low_inputs_needs, low_weight_needs = ctx.needs_input_grad[7:]
        # only hidden states (and LoRA's inputs) have a gradient, which is a multiple of d logprob / d hidden
        frozen = grad_enabled and not (weight_needs or bias_needs or low_weight_needs)
        needs = [hidden_needs, low_inputs_needs][: len(factors)]
        keep = frozen and any(needs)
        products = HeadProducts(
            factors,
            dtype,
            want_inputs=[frozen and need for need in needs],
            want_weights=[False] * len(factors),
            gradient_rows=hidden.shape[0] if keep else 0,
            float32_logits=float32_logits,
        )
        logprobs_N = torch.empty(hidden.shape[0], dtype=products.sum_dtype, device=hidden.device)
        entropies_N = torch.empty_like(logprobs_N) if want_entropy else None

        def statistics_of(tile, rows):
            statistics = softmax(tile, targets[rows], transform, bias=bias, entropy=want_entropy, keep=keep)
            logprobs_N[rows] = statistics.logprob
            if entropies_N is not None:
                entropies_N[rows] = statistics.entropy
            return statistics

        def row_pass(tile, rows, kept):
            statistics = statistics_of(tile, rows)
            ones = torch.ones_like(statistics.logprob)
            options = {"bias": bias, "dtype": products.dtype, "out": kept}
            return gradient(tile, targets[rows], statistics, transform, ones, None, **options)

        products.run_windows(None, row_pass)
        for rows in itertools.starmap(slice, products.plan.rest):
            statistics_of(products.logits(rows), rows)
        products.release()
        ctx.transform, ctx.dtype, ctx.want_entropy, ctx.sketch = transform, dtype, want_entropy, sketch
        ctx.float32_logits = float32_logits
        ctx.kept = [factor.inputs_grad for factor in products.factors] if frozen else None
        ctx.save_for_backward(targets, hidden, weight, bias, low_inputs, low_weight)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiated
    def backward(ctx, logprob_grad_N, entropy_grad_N):
        _, *inputs = ctx.saved_tensors
        if ctx.kept is not None and entropy_grad_N is None:
            grads = [
                None if kept is None or logprob_grad_N is None else (kept * logprob_grad_N[:, None]).to(like.dtype)
                for kept, like in zip([*ctx.kept, None][:2], (inputs[0], inputs[3]), strict=True)
            ]
            return (*7 * [None], grads[0], None, None, grads[1], None)
        products = _recompute(ctx, logprob_grad_N, entropy_grad_N)
        if ctx.sketch is not None and products.projected is not None:
            with ctx.sketch.guarded():
                ctx.sketch.add(products.projected)
        bias_grad = products.bias_grad
        if ctx.needs_input_grad[9] and bias_grad is None:
            bias_grad = torch.zeros_like(inputs[2], dtype=products.sum_dtype)
        (head, *rest), weight_grads = products.factors, [*products.weight_grads(), None]
        low = rest[0] if rest else None
        totals: list[Any] = [head.inputs_grad, weight_grads[0], bias_grad, low and low.inputs_grad, weight_grads[1]]
        units: list[Any] = [None, head.weight_unit, None, None, low and low.weight_unit]
        return (*7 * [None], *(_in_dtype(*one) for one in zip(totals, inputs, units, strict=True)))


def _in_dtype(total: torch.Tensor | None, like: Any, unit: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a gradient in the dtype of ``like``, multiplied by its unit."""
    if total is None:
        return None
    return cast(total, like.dtype) if unit is None else scaled(total, unit, like.dtype)


def _recompute(ctx: Any, logprob_grad_N: torch.Tensor | None, entropy_grad_N: torch.Tensor | None) -> HeadProducts:
    """Recomputes the tiles of the rows that have an upstream gradient, and sums their gradients."""
    targets, hidden, weight, bias, low_inputs, low_weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[7:]
    live_N = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for upstream in (logprob_grad_N, entropy_grad_N):
        if upstream is not None:
            live_N |= upstream != 0
    order = live_N.nonzero().squeeze(1)
    softmax, gradient = row_functions(hidden.device, torch.promote_types(ctx.dtype, torch.float32))
    factors: Factors = [(hidden, weight)] + ([(low_inputs, low_weight)] if low_inputs is not None else [])
    products = HeadProducts(
        factors,
        ctx.dtype,
        want_inputs=[needs[0], needs[3]][: len(factors)],
        want_weights=[needs[1], needs[4]][: len(factors)],
        want_bias=needs[2],
        gradient_rows=len(order),
        sketch=ctx.sketch,
        float32_logits=ctx.float32_logits,
    )

    def row_pass(tile, rows, kept):
        wanted = entropy_grad_N is not None
        statistics = softmax(tile, targets[rows], ctx.transform, bias=bias, entropy=wanted, keep=True)
        logprob_grad = torch.zeros_like(statistics.logprob) if logprob_grad_N is None else logprob_grad_N[rows]
        entropy_grad = None if entropy_grad_N is None else entropy_grad_N[rows]
        upstream = (ctx.transform, logprob_grad, entropy_grad)
        return gradient(tile, targets[rows], statistics, *upstream, bias=bias, dtype=products.dtype, out=kept)

    products.run_windows(order, row_pass)
    products.release()
    return products


@torch.compiler.disable
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    head_sketch: HeadSketch | None = None,
    float32_logits: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes the log-prob of each target token and, with ``entropy``, the entropy of the head's distribution.

    The same in plain torch, with the full logits::

        y = hidden @ weight.T (+ low_rank[0] @ low_rank[1].T) (+ bias)
        z = logit_scale * y / temperature        or, with a softcap,
        z = softcap * tanh(logit_scale * y / softcap) / temperature
        logp = z.log_softmax(-1)
        logprobs = logp.gather(-1, targets[..., None])[..., 0]
        entropies = -(logp.exp() * logp).sum(-1)

    Both are differentiable by ``hidden``, ``weight``, ``bias`` and ``low_rank``. With a trainable head, the backward
    recomputes only rows whose upstream gradient isn't zero. Products are in autocast's dtype, as in ``linear``. Sums
    and row arithmetic are in float32 (float64 for float64). A bias of -inf masks a column.

    Args:
        hidden: (N, H) or (B, T, H), float32, bfloat16, float16 or float64. N may be 0.
        weight: (V, H), V at least 1.
        targets: hidden's leading shape, int64 or int32, in [0, V).
        bias: (V,).
        low_rank: a LoRA adapter on the head: scaled ``lora_A(hidden)``, (N, R) or (B, T, R), and its B, (V, R).
        temperature: above 0.
        logit_scale: factor on the products (Cohere, Granite).
        softcap: above 0 (Gemma).
        entropy: whether to return entropies.
        head_sketch: with a trainable head, receives dL/dlogits projected to a few numbers per token, see
            ``products.HeadSketch``.
        float32_logits: False rounds logits of half-precision operands to their dtype on a GPU, as ``linear`` and a CPU
            do. That is half of the bytes, and log-probs with fewer digits: measured, 0.08 to 0.48 of the error of plain
            torch in bfloat16, where float32 logits have less than 0.01. Statistics of a row stay in float32.

    Returns:
        logprobs, or (logprobs, entropies): targets' shape, float32 (float64 for float64), in nats.

    Raises:
        ValueError: for shapes, devices or dtypes that don't fit, targets outside the vocabulary, numbers out of range.
    """
    check_head(hidden, weight, targets, bias, low_rank, temperature, logit_scale, softcap)
    check_flag("float32_logits", float32_logits)
    head_sketch = usable_sketch(head_sketch, weight)
    check_values([("targets hold", targets, weight.shape[0])])
    shape = targets.shape
    low_inputs, low_weight = (None, None) if low_rank is None else low_rank
    logprobs_N, entropies_N = LinearLogprobFunction.apply(
        compute_dtype(hidden),
        targets.reshape(-1).long(),
        Transform(float(temperature), float(logit_scale), softcap),
        entropy,
        torch.is_grad_enabled(),
        head_sketch,
        float32_logits,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if low_inputs is None else low_inputs.reshape(-1, low_inputs.shape[-1]),
        low_weight,
    )
    return (logprobs_N.view(shape), entropies_N.view(shape)) if entropy else logprobs_N.view(shape)
