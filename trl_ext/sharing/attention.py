"""Computes attention in a packed row of prompts and their answers (``packed_rows.py``), in one of two exact ways.

In parts (``parts.py``): nothing is masked and no key is copied. This way is used where ``flash.py`` supports the
tensors: on a CPU, and on a GPU in half precision. In a compiled layer it is an operator (``operators.py``).

By masks (``by_masks``): answers are unpacked to rows, with copies of their prompt's keys and values. This way is used
for everything else: other tensors, windows shorter than a sequence, and dropout. With dropout all answers of a prompt
share the prompt's dropout masks, so the gradient is right on average.

Shapes: S packed tokens, H heads, D head width; B sequences, R answer columns, W prompt columns, P prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import flash, operators
from .packed_rows import KEYWORD, LENGTHS, LONGEST, PackedRows
from .parts import InParts

# arguments that models pass to attention and that have no effect here
HARMLESS = {
    *("position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal"),
    *("return_dict", "output_router_logits", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k"),
}


class NotShared(ValueError):  # noqa: N818
    """The model's attention isn't plain softmax attention: it has sinks, soft caps or biases."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention of a packed row, with the signature of transformers' attention functions.

    Args:
        query, key, value: (1, heads, S, D).
        others: must include the row's ``PackedRows`` under ``KEYWORD``; in a compiled layer ``LENGTHS``, its table of
            lengths, and ``LONGEST`` instead.

    Returns:
        The output (1, S, H, D), and None in place of attention weights.

    Raises:
        NotShared: the model passes an argument that changes the softmax.
        NotCompiled: the layer is compiled, and only ``by_masks`` can compute this.
    """
    rows: PackedRows | None = others.pop(KEYWORD, None)
    lengths, longest = others.pop(LENGTHS, None), others.pop(LONGEST, 0)
    given = [name for name, value in others.items() if value is not None and value is not False]
    unsupported = [name for name in given if name not in HARMLESS]
    if unsupported:
        raise NotShared(f"its attention takes {', '.join(unsupported)}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embeddings may return float32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if rows is None:
        if dropout or (sliding_window is not None and sliding_window < longest):
            raise operators.NotCompiled("attention with dropout or a sliding window")
        return operators.packed_attention(query, key, value, lengths, scale)[0], None
    rows.windows.add(sliding_window)
    window = sliding_window if sliding_window is not None and sliding_window < rows.longest else None
    if window is None and not dropout and flash.supports(query, key, value):
        return InParts.apply(query, key, value, rows.spans(), scale).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return by_masks(query, key, value, rows, scale, window, dropout), None


def by_masks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: PackedRows,
    scale: float,
    window: int | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Computes attention by masks, on unpacked rows; query, key, value (1, H, S, D). Returns (1, S, H, D)."""
    prompt_mask, answer_mask = rows.masks(window, query.dtype)
    width = rows.width
    prompt_PW, answer_BR = rows.packed_BC[rows.row_P, :width], rows.packed_BC[:, width:]
    n_prompts, n_answer = len(prompt_PW), answer_BR.shape[1]

    def unpack(packed: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Unpacks (1, H, S, D) to (rows, H, columns, D); padding holds the first token, which the mask hides."""
        flat = packed[0].transpose(0, 1).index_select(0, place.clamp(min=0).flatten())
        return flat.view(*place.shape, *flat.shape[1:]).transpose(1, 2)

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[-1])

    prompt_q, prompt_k, prompt_v = (unpack(x, prompt_PW) for x in (query, key, value))
    answer_q, answer_k, answer_v = (unpack(x, answer_BR) for x in (query, key, value))
    k = torch.cat([prompt_k[rows.prompt_B], answer_k], 2)
    v = torch.cat([prompt_v[rows.prompt_B], answer_v], 2)
    out = torch.cat([softmax(prompt_q, prompt_k, prompt_v, prompt_mask), softmax(answer_q, k, v, answer_mask)])
    row_S, column_S = rows.token_S // (width + n_answer), rows.token_S % (width + n_answer)
    of_prompts_S = rows.prompt_B[row_S] * width + column_S
    of_answers_S = n_prompts * width + row_S * n_answer + column_S - width
    return out.index_select(0, torch.where(column_S < width, of_prompts_S, of_answers_S))[None]
