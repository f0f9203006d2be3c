"""Attention in parts as an operator, which ``torch.compile`` calls without looking inside.

The row's layout is a table of lengths on the CPU (``PackedRows.table``). Reading it doesn't wait for a GPU, and nothing
is compiled for its values. CUDA graphs leave the operator out, because its launches depend on the lengths.

Shapes: S packed tokens, D head width; query (1, H, S, D), key and value (1, K, S, D), H a multiple of K.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import flash, parts
from .packed_rows import Spans, spans_of

_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


class NotCompiled(ValueError):  # noqa: N818
    """Only ``attention.by_masks`` can compute this, which isn't compiled."""


@lru_cache(maxsize=8)
def _spans(table: tuple[int, ...]) -> tuple[Spans, Spans]:
    """Returns the spans of a table of lengths; the layers of a micro-batch share them and what they cache."""
    n_prompts, n_answers, *lengths = table
    ends = n_prompts, 2 * n_prompts, 2 * n_prompts + n_answers
    return spans_of(lengths[: ends[0]], lengths[ends[0] : ends[1]], lengths[ends[1] : ends[2]])


@torch.library.custom_op("curvature_grpo::packed_attention", mutates_args=(), tags=_TAGS)
def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (1, S, H, D) and the log-sum-exp (1, H, S). ``table``: of ``PackedRows.table``."""
    out, lse = parts.forward(query, key, value, _spans(tuple(table.tolist())), scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@packed_attention.register_fake
def _(query, key, value, table, scale):
    if not flash.supports(query, key, value):
        sizes = f"{query.shape[-1]} and {value.shape[-1]} numbers"
        raise NotCompiled(f"attention of heads of {sizes} in {query.dtype} on {query.device.type}")
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return _by_token_like(query).transpose(1, 2), lse


@torch.library.custom_op("curvature_grpo::packed_attention_backward", mutates_args=(), tags=_TAGS)
def packed_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value."""
    spans = _spans(tuple(table.tolist()))
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    of_query, of_key, of_value = parts.backward(grad_out, query, key, value, out, lse, spans, scale)
    return _by_token(of_query), _by_token(of_key), _by_token(of_value)


@packed_attention_backward.register_fake
def _(grad_out, query, key, value, out, lse, table, scale):
    return _by_token_like(query), _by_token_like(key), _by_token_like(value)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """Returns (1, H, S, D) in memory where a token's heads are neighbours, as a GPU's operator has them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _by_token_like(x: torch.Tensor) -> torch.Tensor:
    heads, tokens, width = x.shape[1:]
    return x.new_empty(1, tokens, heads, width).transpose(1, 2)


def _keep(ctx, inputs, output) -> None:
    query, key, value, table, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, table)


def _gradients(ctx, grad_out, grad_lse):
    return *packed_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None, None


packed_attention.register_autograd(_gradients, setup_context=_keep)
