"""The layout of rows that share prompts: all prompts, then all answers, in the order of their prompts, no padding.

Shapes: B sequences of a micro-batch, W prompt columns (padded on the left), R completion columns, C = W + R, S packed
tokens, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

KEYWORD = "packed_rows"  # under which layers hand it down


@dataclass(frozen=True)
class Spans:
    """Which keys queries see: of the row's ``queries`` the first ``query_lengths[0]`` those that are the first
    ``key_lengths[0]`` of ``keys``, and so on. ``causal``: of these, as far as they stand themselves (lengths are the
    same)."""

    queries: slice
    keys: slice
    query_lengths: list[int]
    key_lengths: list[int]
    causal: bool
    known: dict[str, Any] = field(default_factory=dict)  # what attention makes of it once for all layers


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
    longest: int  # of a prompt with its answer
    windows: set[int | None] = field(default_factory=set)  # that layers told their attention
    _masks: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _spans: tuple[Spans, ...] = ()

    def spans(self) -> tuple[Spans, ...]:
        """Prompts of themselves, answers of their prompts, answers of themselves; the last two have the same
        queries."""
        if not self._spans:
            there_BC = self.packed_BC >= 0
            prompts = there_BC[self.row_P, : self.width].sum(1).tolist()
            by_prompt = self.prompt_B.argsort(stable=True)
            answers_B = there_BC[:, self.width :].sum(1)
            answers = answers_B[by_prompt].tolist()
            of_prompts = answers_B.new_zeros(len(prompts)).index_add_(0, self.prompt_B, answers_B).tolist()
            first, last = slice(0, sum(prompts)), slice(sum(prompts), len(self.token_S))
            self._spans = (
                Spans(first, first, prompts, prompts, causal=True),
                Spans(last, first, of_prompts, prompts, causal=False),
                Spans(last, last, answers, answers, causal=True),
            )
        return self._spans

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
    """Rows with the same first ``width`` columns share them. ``input_ids_BC`` and ``mask_BC`` (B, C): prompts padded on
    the left, answers on the right.

    Raises:
        ValueError: no rows, another shape of the mask, a width outside [1, C]; a gap, or a row without a prompt.
    """
    if input_ids_BC.ndim != 2 or mask_BC.shape != input_ids_BC.shape or len(mask_BC) == 0:
        shapes = f"{tuple(input_ids_BC.shape)} and {tuple(mask_BC.shape)}"
        raise ValueError(f"token ids and mask must both be (B, C) with a row or more, got {shapes}")
    if not 1 <= width <= mask_BC.shape[1]:
        raise ValueError(f"width={width} must be in [1, {mask_BC.shape[1]}], the columns of the prompts")
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
    token_S = kept_BC.flatten().nonzero().squeeze(1)  # by row
    of_answer_S = token_S % n_columns >= width
    token_S = token_S[(prompt_B[token_S // n_columns] + n_prompts * of_answer_S).argsort(stable=True)]
    packed = token_S.new_full((kept_BC.numel(),), -1)
    packed[token_S] = torch.arange(len(token_S), device=packed.device)
    packed_BC = packed.view_as(kept_BC)
    packed_BC[:, :width] = packed_BC[row_P[prompt_B], :width]
    position_BC = (column_C - (width - lengths_B[0])[:, None]).clamp(min=0)
    longest = int((lengths_B[0] + lengths_B[1]).max())
    return PackedRows(token_S, packed_BC, position_BC, prompt_B, row_P, width, longest)
