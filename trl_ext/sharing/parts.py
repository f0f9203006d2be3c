"""Computes attention in a packed row in parts, whose softmaxes are merged by their log-sum-exps.

Prompts and answers attend to themselves, and all answers of a prompt together attend to the prompt's keys. The backward
of each part is flash attention's, with the output and the log-sum-exp of the merged softmax:
``dS = P (dP - rowsum(dO O))`` with ``P = exp(S - lse)`` needs nothing else (Dao et al. 2022, algorithm 4).

Tokens after the last answer are padding (``compiled_layers.py``): their output and gradients are 0.

Shapes: S packed tokens, D head width; query (1, H, S, D), key and value (1, K, S, D), H a multiple of K.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from . import flash
from .packed_rows import Spans

Parts = tuple[Spans, Spans]  # of ``PackedRows.spans``


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (1, H, S, D) and the log-sum-exp (1, H, S) of the merged softmax."""
    own, to_prompts = parts
    key, value = flash.per_head(query, key, value)
    out, lse = flash.forward(query, key, value, own, scale)
    answers = to_prompts.queries
    if answers.stop > answers.start:
        prompt, prompt_lse = flash.forward(query, key, value, to_prompts, scale)
        own_lse = lse[:, :, answers]
        share_of_prompt = (prompt_lse - own_lse).sigmoid_()[..., None]
        out[:, :, answers].lerp_(prompt, share_of_prompt.to(out.dtype))
        lse[:, :, answers] = torch.logaddexp(prompt_lse, own_lse)
    padding = query.shape[2] - own.queries.stop
    return (_pad_tokens(out, padding), pad(lse, (0, padding))) if padding else (out, lse)


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
    own, to_prompts = parts
    heads = key.shape[1]
    key, value = flash.per_head(query, key, value)
    grads = flash.backward(grad_out, query, key, value, out, lse, own, scale)
    if to_prompts.queries.stop > to_prompts.queries.start:
        found = flash.backward(grad_out, query, key, value, out, lse, to_prompts, scale)
        places = to_prompts.queries, to_prompts.keys, to_prompts.keys
        for grad, part, place in zip(grads, found, places, strict=True):
            grad[:, :, place].add_(part)
    if padding := query.shape[2] - own.queries.stop:
        grads = tuple(_pad_tokens(grad, padding) for grad in grads)  # type: ignore[assignment]
    return grads[0], _sum_repeats(grads[1], heads), _sum_repeats(grads[2], heads)


def _pad_tokens(x: torch.Tensor, padding: int) -> torch.Tensor:
    """Appends tokens of 0 to (1, H, S, D); a token's heads are neighbours in memory, as a GPU's operator has them."""
    return pad(x.transpose(1, 2), (0, 0, 0, 0, 0, padding)).transpose(1, 2)


def _sum_repeats(grad: torch.Tensor, heads: int) -> torch.Tensor:
    """Sums (1, H, S, D) over the query heads that share a key head: the reverse of ``flash.per_head``."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


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
        query, key, value, out, lse = ctx.saved_tensors
        return *backward(grad_out, query, key, value, out, lse, ctx.parts, ctx.scale), None, None
