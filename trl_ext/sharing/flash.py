"""Computes flash attention of spans of a row (``packed_rows.Spans``), forward and backward, by torch's operators.

These operators have no documented interface; ``supports`` returns False if this torch lacks them. On a CPU (float32,
float64, bfloat16) each long span is a call, all short spans together are one, and there must be as many key heads as
query heads (``per_head``). On a GPU (float16, bfloat16) one call takes spans of any length.

Shapes: query (1, H, S, D), key and value (1, K, S, D) with H a multiple of K; Q queries of the spans.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from .packed_rows import Spans

SHORT = 48  # the longest span that runs padded, together with others, on a CPU
NOTHING = 1e4  # the log-sum-exp of padding: probabilities become 0
WIDEST = 256  # the largest head width on a GPU

_cpu: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_cpu_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_gpu: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
_gpu_backward: Any = getattr(torch.ops.aten, "_flash_attention_backward", None)


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether torch has flash attention for tensors of these shapes, dtypes and device."""
    if query.shape[-1] != value.shape[-1] or not query.dtype == key.dtype == value.dtype:
        return False
    if query.device.type == "cpu":
        return None not in (_cpu, _cpu_backward)
    return (
        query.is_cuda
        and torch.version.hip is None
        and None not in (_gpu, _gpu_backward)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= WIDEST
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output (1, H, Q, D) and the log-sum-exp (1, H, Q) of the spans' queries."""
    q, k, v = query[:, :, spans.queries], key[:, :, spans.keys], value[:, :, spans.keys]
    if query.is_cuda:
        q, k, v = _by_token(q, k, v)
        out, lse, *_ = _gpu(q, k, v, *_offsets(spans, q.device), 0.0, spans.causal, False, scale=scale)
        return out.transpose(0, 1)[None], lse[None]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    padded, separate = _short(spans, q.device)
    if padded is not None:
        own, own_lse = _cpu(*(_unpack(x, padded) for x in (q, k, v)), 0.0, True, scale=scale)
        kept = _kept(spans, padded)
        _put(out, own, kept)
        _put(lse[..., None], own_lse[..., None], kept)
    for queries, keys in separate:
        part = _cpu(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, spans.causal, scale=scale)
        out[:, :, queries], lse[:, :, queries] = part
    return out, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spans: Spans,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of the spans' queries (1, H, Q, D), and of their keys and values.

    Args:
        grad_out, out: (1, H, S, D), of the softmax over all keys; the spans' keys may be a part of them.
        lse: (1, H, S), the log-sum-exp over all keys.
    """
    at = spans.queries
    grad_out, q, out, lse = grad_out[:, :, at], query[:, :, at], out[:, :, at], lse[:, :, at]
    k, v = key[:, :, spans.keys], value[:, :, spans.keys]
    if query.is_cuda:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state for dropout
        g, q, k, v, o = _by_token(grad_out, q, k, v, out)
        cu_q, cu_k, max_q, max_k = _offsets(spans, q.device)
        found = _gpu_backward(
            g, q, k, v, o, lse[0].contiguous(), cu_q, cu_k, max_q, max_k, 0.0, spans.causal, unused, unused, scale=scale
        )
        return tuple(grad.transpose(0, 1)[None] for grad in found)  # type: ignore[return-value]
    grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    padded, separate = _short(spans, q.device)
    if padded is not None:
        is_token = (padded >= 0)[:, None, :]
        g, own_lse = _unpack(grad_out, padded) * is_token[..., None], _unpack(lse[..., None], padded)[..., 0]
        tensors = [_unpack(x, padded) for x in (q, k, v, out)]
        parts = _cpu_backward(g, *tensors, torch.where(is_token, own_lse, NOTHING), 0.0, True, scale=scale)
        for grad, part in zip(grads, parts, strict=True):
            _put(grad, part, _kept(spans, padded))
    for queries, keys in separate:
        of_queries, of_keys = (grad_out[:, :, queries], q[:, :, queries]), (k[:, :, keys], v[:, :, keys])
        results = out[:, :, queries], lse[:, :, queries]
        parts = _cpu_backward(*of_queries, *of_keys, *results, 0.0, spans.causal, scale=scale)
        for grad, part, place in zip(grads, parts, (queries, keys, keys), strict=True):
            grad[:, :, place] = part
    return grads


def per_head(query: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Repeats key and value heads to one per query head, on a CPU; a GPU's operator needs no repetition."""
    repeats = query.shape[1] // tensors[0].shape[1]
    return tensors if query.is_cuda or repeats == 1 else tuple(x.repeat_interleave(repeats, 1) for x in tensors)


def _by_token(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Transposes (1, H, S, D) to (S, H, D), the layout of the GPU's operator."""
    return [x[0].transpose(0, 1).contiguous() for x in tensors]


def _offsets(spans: Spans, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Returns the GPU operator's offsets of the spans' queries and keys, and the largest length of each."""
    if "offsets" not in spans.cache:
        both = spans.query_lengths, spans.key_lengths
        offsets = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in both)
        spans.cache["offsets"] = (*offsets, max(both[0]), max(both[1]))
    return spans.cache["offsets"]


def _short(spans: Spans, device: torch.device) -> tuple[torch.Tensor | None, list[tuple[slice, slice]]]:
    """Splits spans into short causal ones, which run together, and the others.

    Returns:
        The positions (N, R) of the short spans' tokens, -1 at padding, or None; queries and keys of each other span.
    """
    if "short" in spans.cache:
        return spans.cache["short"]
    queries, keys = ([0, *accumulate(lengths)] for lengths in (spans.query_lengths, spans.key_lengths))
    short, separate, padded = [], [], None
    for i, length in enumerate(spans.query_lengths):
        if spans.causal and length <= SHORT:
            short.append((queries[i], length))
        elif length:
            separate.append((slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])))
    if any(length for _, length in short):
        begin, length = torch.tensor(short, device=device).T[..., None]
        column = torch.arange(max(tokens for _, tokens in short), device=device)
        padded = torch.where(column < length, begin + column, -1)
    spans.cache["short"] = padded, separate
    return padded, separate


def _unpack(packed: torch.Tensor, place_NR: torch.Tensor) -> torch.Tensor:
    """Unpacks (1, H, Q, D) to spans (N, H, R, D); padding holds the first token."""
    rows = packed[0].transpose(0, 1).index_select(0, place_NR.clamp(min=0).flatten())
    return rows.view(*place_NR.shape, *rows.shape[1:]).transpose(1, 2)


def _kept(spans: Spans, place_NR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns span, column and packed position of each token that isn't padding, once for all layers."""
    if "kept" not in spans.cache:
        span, column = (place_NR >= 0).nonzero(as_tuple=True)
        spans.cache["kept"] = span, column, place_NR[span, column]
    return spans.cache["kept"]


def _put(packed: torch.Tensor, rows: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Writes spans (N, H, R, D), without padding, to their positions in (1, H, Q, D); ``kept`` is of ``_kept``."""
    span, column, position = kept
    packed[0].transpose(0, 1).index_copy_(0, position, rows.transpose(1, 2)[span, column])
