"""Computes log-probs and entropies of tokens from hidden states, without the (N, V) logits, for any loss on them.

Shapes: N tokens, C tokens of a tile, H hidden, V vocabulary.

The forward costs 2 N V H operations. With a frozen weight it also computes d logprob / d hidden, (N, H), at another
2 N V H, and the backward only scales its rows. With a trainable weight the backward recomputes the tiles of the rows
whose upstream gradient isn't zero, a share f: (2 + 6 f) N V H in all.
"""

from __future__ import annotations

import torch

from grpo_kernels.head.rows.plain import Transform

from .checks import check_flag, check_head, check_values, usable_sketch
from .derivatives import once_differentiated, without_autocast
from .logprob_operator import logprob_in_a_graph
from .logprob_tiles import LogprobCall, Operands, recompute, run_logprob, scale_kept
from .products import HeadSketch, compute_dtype


class LinearLogprobFunction(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, call, targets, grad_enabled, sketch, *operands):
        ctx.set_materialize_grads(False)
        needs = [grad_enabled and need for need in ctx.needs_input_grad[4:]]
        logprobs_N, entropies_N, ctx.kept = run_logprob(call, needs, targets, operands)
        ctx.call, ctx.sketch = call, sketch
        ctx.save_for_backward(targets, *operands)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiated
    def backward(ctx, logprob_grad_N, entropy_grad_N):
        targets, *operands = ctx.saved_tensors
        if ctx.kept is not None and entropy_grad_N is None:
            return (*4 * [None], *scale_kept(ctx.kept, logprob_grad_N, operands))
        needs = ctx.needs_input_grad[4:]
        return (*4 * [None], *recompute(ctx.call, needs, targets, operands, logprob_grad_N, entropy_grad_N, ctx.sketch))


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
    low_inputs, low_weight = (None, None) if low_rank is None else low_rank
    operands = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if low_inputs is None else low_inputs.reshape(-1, low_inputs.shape[-1]),
        low_weight,
    )
    transform = Transform(float(temperature), float(logit_scale), softcap)
    call, flat_N = LogprobCall(compute_dtype(hidden), transform, entropy, float32_logits), targets.reshape(-1).long()
    if torch.compiler.is_compiling() and head_sketch is None:
        logprobs_N, entropies_N = logprob_in_a_graph(call, flat_N, operands)
    else:
        logprobs_N, entropies_N = _eager(call, flat_N, operands, head_sketch)
    return (
        (logprobs_N.view(targets.shape), entropies_N.view(targets.shape)) if entropy else logprobs_N.view(targets.shape)
    )


@torch.compiler.disable
def _eager(
    call: LogprobCall, targets: torch.Tensor, operands: Operands, sketch: HeadSketch | None
) -> tuple[torch.Tensor, torch.Tensor]:
    sketch = usable_sketch(sketch, operands[1])
    check_values([("targets hold", targets, operands[1].shape[0])])
    return LinearLogprobFunction.apply(call, targets, torch.is_grad_enabled(), sketch, *operands)
