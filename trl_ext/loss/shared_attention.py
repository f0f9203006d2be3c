"""Attention in a row of prompts, each followed by its answers (``packed_rows.py``), in two ways that are both exact.

In parts: prompts attend to themselves, all answers of a prompt at once to its keys, and each answer to its own; the two
softmaxes of an answer become one by their log-sum-exps. Nothing is masked and no key is copied. The gradient of each
part is flash attention's own, given the output and the log-sum-exp of the whole: ``dS = P (dP - rowsum(dO O))`` with
``P = exp(S - lse)`` needs nothing else (Dao et al. 2022, algorithm 4). For CPUs, whose flash attention is the one
that is called here.

By masks: answers unpacked to rows, with copies of their prompt's keys and values. For everything else, and for windows
that are shorter than a sequence.

Shapes: S packed tokens, H heads, D a head's width; B sequences, R answer columns, W prompt columns, P prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .packed_rows import KEYWORD, Block, PackedRows

# what else a model may tell its attention, and that changes nothing here
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal",
            "return_dict", "output_router_logits", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k"}  # fmt: skip
NOTHING = 1e4  # log-sum-exp where no token is: a probability of 0

# torch's own, of no documented interface; None in a torch without: by masks then
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class NotShared(ValueError):  # noqa: N818
    """What of a model's attention isn't plain softmax attention (sinks, soft caps, biases, dropout)."""


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
    """As transformers calls one: query, key, value (1, heads, S, D); (1, S, H, D). Raises ``NotShared``."""
    rows: PackedRows = others.pop(KEYWORD)
    odd = [name for name, given in others.items() if name not in HARMLESS and given is not None and given is not False]
    if odd or dropout:
        raise NotShared(f"its attention takes {', '.join(odd) or 'dropout'}")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows.windows.add(sliding_window)
    window = sliding_window if sliding_window is not None and sliding_window < rows.longest else None
    on_cpu = query.device.type == "cpu" and _flash is not None and _flash_backward is not None
    if window is None and on_cpu and query.shape[-1] == value.shape[-1]:
        return InParts.apply(query, key, value, rows.blocks(), scale).transpose(1, 2), None
    return by_masks(query, key, value, rows, scale, window), None


class InParts(torch.autograd.Function):
    """(1, H, S, D), of as many heads of keys and values."""

    @staticmethod
    def forward(ctx, query, key, value, blocks: list[Block], scale: float):
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for block in blocks:
            prompt, answers = slice(block.start, block.answers), slice(block.answers, block.end)
            of_prompt = key[:, :, prompt], value[:, :, prompt]
            out[:, :, prompt], lse[:, :, prompt] = _flash(query[:, :, prompt], *of_prompt, 0.0, True, scale=scale)
            if block.end == block.answers:
                continue
            before, before_lse = _flash(query[:, :, answers], *of_prompt, 0.0, False, scale=scale)
            for place_GR in block.own:
                own, own_lse = _flash(*(_unpack(x, place_GR) for x in (query, key, value)), 0.0, True, scale=scale)
                _put(out, own, place_GR)
                _put(lse[..., None], own_lse[..., None], place_GR)
            own_lse, whole = lse[:, :, answers], torch.logaddexp(before_lse, lse[:, :, answers])
            out[:, :, answers] *= (own_lse - whole).exp()[..., None].to(out.dtype)
            out[:, :, answers] += before * (before_lse - whole).exp()[..., None].to(out.dtype)
            lse[:, :, answers] = whole
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(torch.zeros_like(x) for x in (query, key, value))
        grad_out = grad_out.contiguous()

        def add(queries: slice, keys: slice, causal: bool) -> None:
            of_queries = [x[:, :, queries] for x in (grad_out, query)]
            parts = _flash_backward(
                *of_queries, key[:, :, keys], value[:, :, keys], out[:, :, queries], lse[:, :, queries],
                0.0, causal, scale=ctx.scale,
            )  # fmt: skip
            for grad, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
                grad[:, :, where] += part

        for block in ctx.blocks:
            prompt, answers = slice(block.start, block.answers), slice(block.answers, block.end)
            add(prompt, prompt, True)
            if block.end == block.answers:
                continue
            add(answers, prompt, False)
            for place_GR in block.own:
                unpacked = [_unpack(x, place_GR) for x in (grad_out, query, key, value, out)]
                there = (place_GR >= 0)[:, None, :]
                unpacked[0] = unpacked[0] * there[..., None]
                own_lse = torch.where(there, _unpack(lse[..., None], place_GR)[..., 0], NOTHING)
                parts = _flash_backward(*unpacked, own_lse, 0.0, True, scale=ctx.scale)
                for grad, part in zip(grads, parts, strict=True):
                    _put(grad, part, place_GR, add=True)
        return *grads, None, None


def _unpack(packed: torch.Tensor, place_GR: torch.Tensor) -> torch.Tensor:
    """(1, H, S, D) to answers (G, H, R, D); behind an answer's end stands the first token."""
    rows = packed[0].transpose(0, 1).index_select(0, place_GR.clamp(min=0).flatten())
    return rows.view(*place_GR.shape, *rows.shape[1:]).transpose(1, 2)


def _put(packed: torch.Tensor, rows: torch.Tensor, place_GR: torch.Tensor, *, add: bool = False) -> None:
    """(G, H, R, D) into their places of (1, H, S, D)."""
    there, by_place = place_GR >= 0, packed[0].transpose(0, 1)
    place = place_GR[there]
    (by_place.index_add_ if add else by_place.index_copy_)(0, place, rows.transpose(1, 2)[there])


def by_masks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: PackedRows, scale: float, window: int | None
) -> torch.Tensor:
    """(1, S, H, D)."""
    prompt_mask, answer_mask = rows.masks(window, query.dtype)
    width = rows.width
    prompt_PW, answer_BR = rows.packed_BC[rows.row_P, :width], rows.packed_BC[:, width:]
    n_prompts, n_answer = len(prompt_PW), answer_BR.shape[1]

    def unpack(packed: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """(1, H, S, D) to (rows, H, columns, D); what isn't there is the first token, and isn't seen."""
        flat = packed[0].transpose(0, 1).index_select(0, place.clamp(min=0).flatten())
        return flat.view(*place.shape, *flat.shape[1:]).transpose(1, 2)

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
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
