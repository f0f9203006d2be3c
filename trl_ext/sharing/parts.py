"""Computes attention in a packed row in parts, whose softmaxes are merged by their log-sum-exps.

Each prompt attends to itself, all answers of a prompt together attend to the prompt's keys, and each answer attends to
its own keys. The backward of each part is flash attention's, with the output and the log-sum-exp of the merged softmax:
``dS = P (dP - rowsum(dO O))`` with ``P = exp(S - lse)`` needs nothing else (Dao et al. 2022, algorithm 4).

Tokens after the last answer are padding (``compiled_layers.py``): their output and gradients are 0.

Shapes: S packed tokens, D head width; query (1, H, S, D), key and value (1, K, S, D), H a multiple of K.
"""

from __future__ import annotations

import torch

from . import flash
from .packed_rows import Spans

Parts = tuple[Spans, Spans, Spans]  # of ``PackedRows.spans``


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (1, H, S, D) and the log-sum-exp (1, H, S) of the merged softmax."""
    of_prompts, to_prompts, of_answers = parts
    key, value = flash.per_head(query, key, value)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    prompts, answers = of_prompts.queries, of_answers.queries
    out[:, :, prompts], lse[:, :, prompts] = flash.forward(query, key, value, of_prompts, scale)
    if answers.stop > answers.start:
        prompt, prompt_lse = flash.forward(query, key, value, to_prompts, scale)
        own, own_lse = flash.forward(query, key, value, of_answers, scale)
        merged_lse = torch.logaddexp(prompt_lse, own_lse)
        prompt.mul_((prompt_lse - merged_lse).exp_()[..., None])
        torch.addcmul(prompt, own, (own_lse - merged_lse).exp_()[..., None].to(own), out=out[:, :, answers])
        lse[:, :, answers] = merged_lse
    if answers.stop < query.shape[2]:
        out[:, :, answers.stop :] = 0
        lse[:, :, answers.stop :] = 0
    return out, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    parts: Parts,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value. ``out`` and ``lse`` are what ``forward`` returned."""
    heads = key.shape[1]
    key, value = flash.per_head(query, key, value)
    grads = tuple(torch.zeros_like(x) for x in (query, key, value))
    for spans in parts:
        if spans.queries.stop > spans.queries.start:
            found = flash.backward(grad_out, query, key, value, out, lse, spans, scale)
            for grad, part, place in zip(grads, found, (spans.queries, spans.keys, spans.keys), strict=True):
                grad[:, :, place] += part
    of_key, of_value = (grad.unflatten(1, (heads, -1)).sum(2) for grad in grads[1:])
    return grads[0], of_key, of_value


class InParts(torch.autograd.Function):
    """Computes attention in parts: query (1, H, S, D), key and value (1, K, S, D), H a multiple of K; (1, H, S, D)."""

    @staticmethod
    def forward(ctx, query, key, value, parts: Parts, scale: float):
        out, lse = forward(query, key, value, parts, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        return *backward(grad_out, *ctx.saved_tensors, ctx.parts, ctx.scale), None, None
