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
    """Returns the output (1, H, Q, D) and the log-sum-exp (1, H, Q) of the spans' queries, in new memory."""
    q, k, v = _part(query, spans.queries), _part(key, spans.keys), _part(value, spans.keys)
    if query.is_cuda:
        q, k, v = _by_token(q, k, v)
        out, lse, *_ = _gpu(q, k, v, *_offsets(spans, q.device), 0.0, spans.causal, False, scale=scale)
        return out.transpose(0, 1)[None], lse[None]
    short, separate = _short(spans, q.device), _separate(spans)
    if short is None:
        pieces = [_piece(spans.causal, scale, *piece) for piece in _pieces(spans, (q,), (k, v))]
        out, lse = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))
        return out, lse
    own, own_lse = _cpu(*(short.unpack(x) for x in (q, k, v)), 0.0, True, scale=scale)
    out, lse = short.pack(own, q.shape[2]), short.pack(own_lse[..., None], q.shape[2])[..., 0]
    for queries, keys in separate:
        part = _piece(spans.causal, scale, q[:, :, queries], k[:, :, keys], v[:, :, keys])
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
    """Returns the gradients of the spans' queries (1, H, Q, D), and of their keys and values, in new memory.

    Args:
        grad_out, out: (1, H, S, D), of the softmax over all keys; the spans' keys may be a part of them.
        lse: (1, H, S), the log-sum-exp over all keys.
    """
    grad_out, q, out, lse = (_part(x, spans.queries) for x in (grad_out, query, out, lse))
    k, v = _part(key, spans.keys), _part(value, spans.keys)
    if query.is_cuda:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state for dropout
        g, q, k, v, o = _by_token(grad_out, q, k, v, out)
        cu_q, cu_k, max_q, max_k = _offsets(spans, q.device)
        found = _gpu_backward(
            g, q, k, v, o, lse[0].contiguous(), cu_q, cu_k, max_q, max_k, 0.0, spans.causal, unused, unused, scale=scale
        )
        return tuple(grad.transpose(0, 1)[None] for grad in found)  # type: ignore[return-value]
    short, separate = _short(spans, q.device), _separate(spans)
    if short is None:
        split = _pieces(spans, (grad_out, q, out, lse), (k, v))
        pieces = [_piece_backward(spans.causal, scale, *piece) for piece in split]
        of_q, of_k, of_v = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))
        return of_q, of_k, of_v
    g, own_lse = short.unpack(grad_out) * short.is_token[..., None], short.unpack(lse[..., None])[..., 0]
    tensors = [short.unpack(x) for x in (q, k, v, out)]
    parts = _cpu_backward(g, *tensors, torch.where(short.is_token, own_lse, NOTHING), 0.0, True, scale=scale)
    grads = tuple(short.pack(part, q.shape[2]) for part in parts)
    for queries, keys in separate:
        of_queries = tuple(x[:, :, queries] for x in (grad_out, q, out, lse))
        found = _piece_backward(spans.causal, scale, *of_queries, k[:, :, keys], v[:, :, keys])
        for grad, part, place in zip(grads, found, (queries, keys, keys), strict=True):
            grad[:, :, place] = part
    return grads  # type: ignore[return-value]


def per_head(query: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Repeats key and value heads to one per query head, on a CPU; a GPU's operator needs no repetition."""
    repeats = query.shape[1] // tensors[0].shape[1]
    return tensors if query.is_cuda or repeats == 1 else tuple(x.repeat_interleave(repeats, 1) for x in tensors)


def _part(x: torch.Tensor, place: slice) -> torch.Tensor:
    """Returns the tokens of (1, H, S, ...) in ``place``."""
    return x if place == slice(0, x.shape[2]) else x[:, :, place]


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


def _pieces(
    spans: Spans, of_queries: tuple[torch.Tensor, ...], of_keys: tuple[torch.Tensor, ...]
) -> list[tuple[torch.Tensor, ...]]:
    """Splits tensors of the spans' queries, and of their keys, into those of each span."""
    split = [x.split(spans.query_lengths, 2) for x in of_queries] + [x.split(spans.key_lengths, 2) for x in of_keys]
    return list(zip(*split, strict=True))


def _piece(causal: bool, scale: float, *query_key_value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output and the log-sum-exp of one span."""
    q, k, v = query_key_value
    if q.shape[2] == 0:
        return q, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return _cpu(q, k, v, 0.0, causal, scale=scale)


def _piece_backward(causal: bool, scale: float, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of one span's queries, keys and values."""
    g, q, out, lse, k, v = tensors
    if q.shape[2] == 0:
        return q, torch.zeros_like(k), torch.zeros_like(v)
    return _cpu_backward(g, q, k, v, out, lse, 0.0, causal, scale=scale)


def _separate(spans: Spans) -> list[tuple[slice, slice]]:
    """Returns queries and keys of each span that isn't short and causal; none of spans without a query."""
    if "separate" not in spans.cache:
        queries, keys = ([0, *accumulate(lengths)] for lengths in (spans.query_lengths, spans.key_lengths))
        spans.cache["separate"] = [
            (slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1]))
            for i, length in enumerate(spans.query_lengths)
            if length and not (spans.causal and length <= SHORT)
        ]
    return spans.cache["separate"]


class Short:
    """The short causal spans of a row, which run together on a CPU: N spans, padded to R tokens.

    Attributes:
        is_token: (N, 1, R), False at padding.
    """

    def __init__(self, place_NR: torch.Tensor, n_tokens: int) -> None:
        self.shape, self.is_token = place_NR.shape, (place_NR >= 0)[:, None, :]
        span, column = (place_NR >= 0).nonzero(as_tuple=True)
        self._index = place_NR.clamp(min=0).flatten()  # padding holds the first token
        self._kept, self._position = (span, column), place_NR[span, column]
        self._all = len(span) == n_tokens  # then the tokens are in order

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpacks (1, H, Q, D) to spans (N, H, R, D)."""
        return packed.index_select(2, self._index).unflatten(2, self.shape)[0].transpose(0, 1)

    def pack(self, rows: torch.Tensor, n_tokens: int) -> torch.Tensor:
        """Packs spans (N, H, R, D), without padding, to (1, H, Q, D); other tokens' memory isn't initialised."""
        span, column = self._kept
        tokens = rows.transpose(1, 2)[span, column]
        if not self._all:
            tokens = tokens.new_empty(n_tokens, *tokens.shape[1:]).index_copy_(0, self._position, tokens)
        return tokens.transpose(0, 1)[None]


def _short(spans: Spans, device: torch.device) -> Short | None:
    """Returns the short causal spans; None if there are none."""
    if "short" not in spans.cache:
        begins = accumulate(spans.query_lengths, initial=0)
        short = [(begin, n) for begin, n in zip(begins, spans.query_lengths, strict=False) if n <= SHORT]
        spans.cache["short"] = None
        if spans.causal and any(length for _, length in short):
            begin, length = torch.tensor(short, device=device).T[..., None]
            column = torch.arange(max(tokens for _, tokens in short), device=device)
            place_NR = torch.where(column < length, begin + column, -1)
            spans.cache["short"] = Short(place_NR, sum(spans.query_lengths))
    return spans.cache["short"]
