"""Flash attention of spans of a row (``packed_rows.Spans``), forward and backward, by torch's own operators.

They have no documented interface: ``can`` says no in a torch without them. On a CPU (float32, float64, bfloat16) spans
are dense calls, the short ones together, and every head of a query wants one of keys (``per_head``); on a GPU (float16,
bfloat16) one call takes spans of any length.

Shapes: query (1, H, S, D), key and value (1, K, S, D) with H a multiple of K; Q queries of the spans.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from .packed_rows import Spans

SHORT = 48  # spans that run together, padded, on a CPU
NOTHING = 1e4  # log-sum-exp where no token is: a probability of 0
WIDEST = 256  # head, on a GPU

_cpu: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_cpu_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_gpu: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)
_gpu_backward: Any = getattr(torch.ops.aten, "_flash_attention_backward", None)


def can(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there is one for tensors like these."""
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
    """Output (1, H, Q, D) and log-sum-exp (1, H, Q) of the spans' queries."""
    q, k, v = query[:, :, spans.queries], key[:, :, spans.keys], value[:, :, spans.keys]
    if query.is_cuda:
        q, k, v = _by_token(q, k, v)
        out, lse, *_ = _gpu(q, k, v, *_offsets(spans, q.device), 0.0, spans.causal, False, scale=scale)
        return out.transpose(0, 1)[None], lse[None]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    together, alone = _short(spans, q.device)
    if together is not None:
        own, own_lse = _cpu(*(_unpack(x, together) for x in (q, k, v)), 0.0, True, scale=scale)
        _put(out, own, together)
        _put(lse[..., None], own_lse[..., None], together)
    for queries, keys in alone:
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
    """Gradients of the spans' queries (1, H, Q, D) and of their keys and values. ``grad_out``, ``out`` (1, H, S, D) and
    ``lse`` (1, H, S) are of the whole softmax, of which these keys may be a part."""
    at = spans.queries
    grad_out, q, out, lse = grad_out[:, :, at], query[:, :, at], out[:, :, at], lse[:, :, at]
    k, v = key[:, :, spans.keys], value[:, :, spans.keys]
    if query.is_cuda:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout
        g, q, k, v, o = _by_token(grad_out, q, k, v, out)
        cu_q, cu_k, max_q, max_k = _offsets(spans, q.device)
        found = _gpu_backward(
            g, q, k, v, o, lse[0].contiguous(), cu_q, cu_k, max_q, max_k, 0.0, spans.causal, unused, unused, scale=scale
        )
        return tuple(grad.transpose(0, 1)[None] for grad in found)  # type: ignore[return-value]
    grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    together, alone = _short(spans, q.device)
    if together is not None:
        there = (together >= 0)[:, None, :]
        g, own_lse = _unpack(grad_out, together) * there[..., None], _unpack(lse[..., None], together)[..., 0]
        tensors = [_unpack(x, together) for x in (q, k, v, out)]
        parts = _cpu_backward(g, *tensors, torch.where(there, own_lse, NOTHING), 0.0, True, scale=scale)
        for grad, part in zip(grads, parts, strict=True):
            _put(grad, part, together)
    for queries, keys in alone:
        of_queries, of_keys = (grad_out[:, :, queries], q[:, :, queries]), (k[:, :, keys], v[:, :, keys])
        told = out[:, :, queries], lse[:, :, queries]
        parts = _cpu_backward(*of_queries, *of_keys, *told, 0.0, spans.causal, scale=scale)
        for grad, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
            grad[:, :, where] = part
    return grads


def per_head(query: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values as ``forward`` and ``backward`` take them."""
    repeats = query.shape[1] // tensors[0].shape[1]
    return tensors if query.is_cuda or repeats == 1 else tuple(x.repeat_interleave(repeats, 1) for x in tensors)


def _by_token(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(1, H, S, D) to (S, H, D), as the GPU's operator takes it."""
    return [x[0].transpose(0, 1).contiguous() for x in tensors]


def _offsets(spans: Spans, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    if "offsets" not in spans.known:
        both = spans.query_lengths, spans.key_lengths
        made = (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in both)
        spans.known["offsets"] = (*made, max(both[0]), max(both[1]))
    return spans.known["offsets"]


def _short(spans: Spans, device: torch.device) -> tuple[torch.Tensor | None, list[tuple[slice, slice]]]:
    """Places (N, R) of the causal spans that run together, -1 behind a span's end; the others."""
    if "short" in spans.known:
        return spans.known["short"]
    queries, keys = ([0, *accumulate(lengths)] for lengths in (spans.query_lengths, spans.key_lengths))
    short, alone, together = [], [], None
    for i, length in enumerate(spans.query_lengths):
        if spans.causal and length <= SHORT:
            short.append((queries[i], length))
        elif length:
            alone.append((slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])))
    if any(length for _, length in short):
        begin, length = torch.tensor(short, device=device).T[..., None]
        column = torch.arange(int(length.max()), device=device)
        together = torch.where(column < length, begin + column, -1)
    spans.known["short"] = together, alone
    return together, alone


def _unpack(packed: torch.Tensor, place_NR: torch.Tensor) -> torch.Tensor:
    """(1, H, Q, D) to spans (N, H, R, D); behind a span's end stands the first token."""
    rows = packed[0].transpose(0, 1).index_select(0, place_NR.clamp(min=0).flatten())
    return rows.view(*place_NR.shape, *rows.shape[1:]).transpose(1, 2)


def _put(packed: torch.Tensor, rows: torch.Tensor, place_NR: torch.Tensor) -> None:
    """(N, H, R, D) into their places of (1, H, Q, D)."""
    there = place_NR >= 0
    packed[0].transpose(0, 1).index_copy_(0, place_NR[there], rows.transpose(1, 2)[there])
