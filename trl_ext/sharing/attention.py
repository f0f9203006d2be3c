"""Computes attention in a packed row of prompts and their answers (``packed_rows.py``), in one of two exact ways.

In parts (``InParts``): each prompt attends to itself, all answers of a prompt together attend to the prompt's keys, and
each answer attends to its own keys. The two softmaxes of an answer are merged by their log-sum-exps. Nothing is masked
and no key is copied. The backward of each part is flash attention's, with the output and the log-sum-exp of the merged
softmax: ``dS = P (dP - rowsum(dO O))`` with ``P = exp(S - lse)`` needs nothing else (Dao et al. 2022, algorithm 4).
This way is used where ``flash.py`` supports the tensors: on a CPU, and on a GPU in half precision.

By masks (``by_masks``): answers are unpacked to rows, with copies of their prompt's keys and values. This way is used
for everything else: other tensors, windows shorter than a sequence, and dropout. With dropout all answers of a prompt
share the prompt's dropout masks, so the gradient is right on average.

Shapes: S packed tokens, H heads, D head width; B sequences, R answer columns, W prompt columns, P prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import flash
from .packed_rows import KEYWORD, PackedRows, Spans

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
        others: must include the row's ``PackedRows`` under ``KEYWORD``.

    Returns:
        The output (1, S, H, D), and None in place of attention weights.

    Raises:
        NotShared: the model passes an argument that changes the softmax.
    """
    rows: PackedRows = others.pop(KEYWORD)
    given = [name for name, value in others.items() if value is not None and value is not False]
    unsupported = [name for name in given if name not in HARMLESS]
    if unsupported:
        raise NotShared(f"its attention takes {', '.join(unsupported)}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embeddings may return float32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows.windows.add(sliding_window)
    window = sliding_window if sliding_window is not None and sliding_window < rows.longest else None
    if window is None and not dropout and flash.supports(query, key, value):
        return InParts.apply(query, key, value, rows.spans(), scale).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return by_masks(query, key, value, rows, scale, window, dropout), None


class InParts(torch.autograd.Function):
    """Computes attention in parts: query (1, H, S, D), key and value (1, K, S, D), H a multiple of K; (1, H, S, D)."""

    @staticmethod
    def forward(ctx, query, key, value, spans: tuple[Spans, Spans, Spans], scale: float):
        of_prompts, to_prompts, of_answers = spans
        given = query, key, value
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
        ctx.save_for_backward(*given, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        heads = key.shape[1]
        key, value = flash.per_head(query, key, value)
        grads = tuple(torch.zeros_like(x) for x in (query, key, value))
        for spans in ctx.spans:
            if spans.queries.stop > spans.queries.start:
                parts = flash.backward(grad_out, query, key, value, out, lse, spans, ctx.scale)
                for grad, part, place in zip(grads, parts, (spans.queries, spans.keys, spans.keys), strict=True):
                    grad[:, :, place] += part
        return grads[0], *(grad.unflatten(1, (heads, -1)).sum(2) for grad in grads[1:]), None, None


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
