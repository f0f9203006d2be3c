"""Answers to one prompt in one row, the prompt once and no padding: ``[prompt][answer 1]...[answer G]``, exactly.

Shapes: B sequences of a micro-batch, W prompt columns (padded on the left), R completion columns, C = W + R, S packed
tokens, P prompts, H heads, D a head's width.

Every layer but attention sees packed tokens only. Attention is made in two parts: a prompt attends to itself; answers
are unpacked to (B, R), and attend to their prompt's keys and values and to their own. Positions are those of the
sequence, an answer's from the end of its prompt on, and so are a sliding window's. The gradient flows back into the
prompt once, summed over its answers, as the sum over B rows gives it.

transformers calls attention by the name in the model's configuration. Where a layer is called with a ``PackedRows``,
also when a checkpointed one is computed again, the name is ours for as long as that call takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "curvature_grpo_shared_prompts"
KEYWORD = "packed_rows"
ATTRIBUTE = "_attn_implementation"  # of a configuration
# what else a model may tell its attention, and that changes nothing here
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "is_causal",
            "return_dict", "output_router_logits", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k"}  # fmt: skip


class NotShared(ValueError):  # noqa: N818
    """What of a model's attention can't be made in two parts."""


@dataclass
class PackedRows:
    """The layout. ``packed_BC``: where each token of the padded rows is among the S, -1 for none; a prompt's, which all
    its sequences have, once. ``prompt_B``: which of the P prompts; ``row_P``: the sequence that brings it."""

    token_S: torch.Tensor  # place in the flattened (B, C) rows
    packed_BC: torch.Tensor
    position_BC: torch.Tensor
    prompt_B: torch.Tensor
    row_P: torch.Tensor
    width: int  # W
    _masks: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """What the backbone takes in place of the padded rows."""
        return {
            "input_ids": input_ids.flatten()[self.token_S][None],
            "position_ids": self.position_BC.flatten()[self.token_S][None],
            # four dimensions: transformers takes it for a whole mask and makes none; attention doesn't look at it
            "attention_mask": torch.zeros(1, 1, 1, 1, device=input_ids.device),
            KEYWORD: self,
        }

    def masks(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Added to the scores: of prompts (P, 1, W, W), of answers (B, 1, R, W + R). Padding sees itself, lest its
        softmax be of nothing."""
        if (window, dtype) not in self._masks:
            there_BC = self.packed_BC >= 0
            where_PW = self.position_BC[self.row_P, : self.width]
            prompt = _may_see(where_PW, where_PW, there_BC[self.row_P, : self.width], window)
            where_BR = self.position_BC[:, self.width :]
            answer = _may_see(where_BR, self.position_BC, there_BC, window)
            for mask, offset in ((prompt, 0), (answer, self.width)):
                rows = torch.arange(mask.shape[-2], device=mask.device)
                mask[..., rows, rows + offset] = True
            both = (torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf) for mask in (prompt, answer))
            self._masks[window, dtype] = tuple(both)  # type: ignore[assignment]
        return self._masks[window, dtype]


def _may_see(query: torch.Tensor, key: torch.Tensor, there: torch.Tensor, window: int | None) -> torch.Tensor:
    """(rows, 1, queries, keys) bool: keys that are there, not after the query, and within the window."""
    distance = query[:, None, :, None] - key[:, None, None, :]
    seen = (distance >= 0) & there[:, None, None, :]
    return seen if window is None else seen & (distance < window)


def pack(input_ids_BC: torch.Tensor, mask_BC: torch.Tensor, width: int) -> PackedRows:
    """Rows with the same first ``width`` columns share them. ``mask_BC``: prompts padded on the left, answers on the
    right; ``ValueError`` for gaps between."""
    there_BC = mask_BC.bool()
    n_columns = there_BC.shape[1]
    column_C = torch.arange(n_columns, device=there_BC.device)
    prompts = torch.where(there_BC[:, :width], input_ids_BC[:, :width], -1)
    _, prompt_B = torch.unique(prompts, dim=0, return_inverse=True)
    n_prompts = int(prompt_B.max()) + 1
    row_B = torch.arange(len(prompt_B), device=prompt_B.device)
    row_P = row_B.new_full((n_prompts,), len(row_B)).scatter_reduce_(0, prompt_B, row_B, "amin")

    lengths_B = (there_BC[:, :width].sum(1), there_BC[:, width:].sum(1))
    expected_BC = (column_C >= width - lengths_B[0][:, None]) & (column_C < width + lengths_B[1][:, None])
    if not torch.equal(there_BC, expected_BC) or int(lengths_B[0].min()) == 0:
        raise ValueError("rows with gaps, or without a prompt, can't be packed")

    kept_BC = there_BC.clone()
    kept_BC[:, :width] &= (row_P[prompt_B] == row_B)[:, None]
    token_S = kept_BC.flatten().nonzero().squeeze(1)  # by row, a prompt before its first answer
    token_S = token_S[prompt_B[token_S // n_columns].argsort(stable=True)]  # by prompt
    packed = token_S.new_full((kept_BC.numel(),), -1)
    packed[token_S] = torch.arange(len(token_S), device=packed.device)
    packed_BC = packed.view_as(kept_BC)
    packed_BC[:, :width] = packed_BC[row_P[prompt_B], :width]
    position_BC = (column_C - (width - lengths_B[0])[:, None]).clamp(min=0)
    return PackedRows(token_S, packed_BC, position_BC, prompt_B, row_P, width)


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
    """As transformers calls one: query, key, value (1, heads, S, D); (1, S, H, D). ``NotShared`` for what isn't plain
    softmax attention (sinks, soft caps, biases)."""
    rows: PackedRows = others.pop(KEYWORD)
    odd = [name for name, given in others.items() if name not in HARMLESS and given is not None and given is not False]
    if odd or dropout:
        raise NotShared(f"its attention takes {', '.join(odd) or 'dropout'}")
    prompt_mask, answer_mask = rows.masks(sliding_window, query.dtype)
    width = rows.width
    prompt_PW, answer_BR = rows.packed_BC[rows.row_P, :width], rows.packed_BC[:, width:]
    n_prompts, n_answer = len(prompt_PW), answer_BR.shape[1]
    repeats = query.shape[1] // key.shape[1]

    def unpack(packed: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """(1, heads, S, D) to (rows, heads, columns, D); what isn't there is the first token, and isn't seen."""
        flat = packed[0].transpose(0, 1).index_select(0, place.clamp(min=0).flatten())
        return flat.view(*place.shape, *flat.shape[1:]).transpose(1, 2)

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v)) if repeats > 1 else (k, v)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[-1])

    of_prompt = [unpack(x, prompt_PW) for x in (query, key, value)]
    of_answer = [unpack(x, answer_BR) for x in (query, key, value)]
    k, v = (torch.cat([p[rows.prompt_B], a], 2) for p, a in zip(of_prompt[1:], of_answer[1:], strict=True))
    prompt_q, prompt_k, prompt_v = of_prompt
    of_prompts = softmax(prompt_q, prompt_k, prompt_v, prompt_mask)
    out = torch.cat([of_prompts, softmax(of_answer[0], k, v, answer_mask)])
    row_S, column_S = rows.token_S // (width + n_answer), rows.token_S % (width + n_answer)
    of_prompts_S = rows.prompt_B[row_S] * width + column_S
    of_answers_S = n_prompts * width + row_S * n_answer + column_S - width
    return out.index_select(0, torch.where(column_S < width, of_prompts_S, of_answers_S))[None], None


AttentionInterface.register(NAME, attention)


def let_share(backbone: Any) -> None:
    """From here on the backbone may be called with ``PackedRows.inputs``; other calls are as they were."""
    configured = [module for module in backbone.modules() if hasattr(getattr(module, "config", None), ATTRIBUTE)]
    before: list[str] = []

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(KEYWORD) is not None:
            before.append(module.config._attn_implementation)
            module.config._attn_implementation = NAME

    def leave(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get(KEYWORD) is not None:
            module.config._attn_implementation = before.pop()

    for module in configured:  # attention among them; checkpointing calls a layer's forward without the layer's hooks
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True, always_call=True)


class SharedPrompts:
    """Whether the rows of a call are to be packed, where TRL's own lines make the call."""

    def __init__(self) -> None:
        self.width: int | None = None

    @contextmanager
    def given(self, width: int | None) -> Iterator[None]:
        """Within, rows have this many prompt columns and are packed; None: not."""
        before, self.width = self.width, width
        try:
            yield
        finally:
            self.width = before
