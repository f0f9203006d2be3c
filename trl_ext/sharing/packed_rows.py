"""Packs a micro-batch into one row without padding: all prompts once, then all answers in the order of their prompts.

Shapes: B sequences of a micro-batch, W prompt columns (padded on the left), R completion columns, C = W + R, S packed
tokens, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

KEYWORD = "packed_rows"  # the keyword argument by which layers pass the PackedRows to attention


@dataclass(frozen=True)
class Spans:
    """Which keys each query attends to. Block i lets ``query_lengths[i]`` queries attend to ``key_lengths[i]`` keys.

    Attributes:
        queries, keys: the parts of the packed row that the blocks divide, in order.
        query_lengths, key_lengths: the lengths of the blocks.
        causal: whether query j of a block attends only to the block's keys 0 to j; the lengths are then equal.
        cache: what ``flash.py`` computes from the lengths once for all layers.
    """

    queries: slice
    keys: slice
    query_lengths: list[int]
    key_lengths: list[int]
    causal: bool
    cache: dict[str, Any] = field(default_factory=dict)


@dataclass
class PackedRows:
    """The layout of a packed row.

    Attributes:
        token_S: (S,), the index of each packed token in the flattened (B, C) rows.
        packed_BC: (B, C), the packed index of each token, -1 at padding; sequences of a prompt share its indices.
        position_BC: (B, C), the position of each token in its sequence.
        prompt_B: (B,), which of the P prompts a sequence has.
        row_P: (P,), the sequence from which a prompt's tokens are taken.
        width: W.
        longest: the most tokens of a prompt with one of its answers.
        windows: the sliding windows that layers have passed to attention; the probe reads them.
    """

    token_S: torch.Tensor
    packed_BC: torch.Tensor
    position_BC: torch.Tensor
    prompt_B: torch.Tensor
    row_P: torch.Tensor
    width: int
    longest: int
    windows: set[int | None] = field(default_factory=set)
    _masks: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _spans: tuple[Spans, ...] = ()

    def spans(self) -> tuple[Spans, ...]:
        """Returns three spans: prompts attend to themselves, answers to their prompts, answers to themselves."""
        if not self._spans:
            is_token_BC = self.packed_BC >= 0
            prompts = is_token_BC[self.row_P, : self.width].sum(1).tolist()
            by_prompt = self.prompt_B.argsort(stable=True)
            answers_B = is_token_BC[:, self.width :].sum(1)
            answers = answers_B[by_prompt].tolist()
            of_prompts = answers_B.new_zeros(len(prompts)).index_add_(0, self.prompt_B, answers_B).tolist()
            first, last = slice(0, sum(prompts)), slice(sum(prompts), len(self.token_S))
            self._spans = (
                Spans(first, first, prompts, prompts, causal=True),
                Spans(last, first, of_prompts, prompts, causal=False),
                Spans(last, last, answers, answers, causal=True),
            )
        return self._spans

    def inputs(self, input_ids: torch.Tensor) -> Mapping[str, Any]:
        """Returns the backbone's inputs that replace the padded rows."""
        return {
            "input_ids": input_ids.flatten()[self.token_S][None],
            "position_ids": self.position_BC.flatten()[self.token_S][None],
            # Four dimensions: transformers takes it for a complete mask and builds none. Our attention ignores it.
            "attention_mask": torch.zeros(1, 1, 1, 1, device=input_ids.device),
            KEYWORD: self,
        }

    def masks(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns masks to add to the scores: of prompts (P, 1, W, W), of answers (B, 1, R, W + R).

        Padding attends to itself, because a softmax over no key is NaN.
        """
        if (window, dtype) not in self._masks:
            is_token_BC = self.packed_BC >= 0
            position_PW = self.position_BC[self.row_P, : self.width]
            prompt = _may_attend(position_PW, position_PW, is_token_BC[self.row_P, : self.width], window)
            position_BR = self.position_BC[:, self.width :]
            answer = _may_attend(position_BR, self.position_BC, is_token_BC, window)
            for mask, offset in ((prompt, 0), (answer, self.width)):
                rows = torch.arange(mask.shape[-2], device=mask.device)
                mask[..., rows, rows + offset] = True
            both = (torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf) for mask in (prompt, answer))
            self._masks[window, dtype] = tuple(both)  # type: ignore[assignment]
        return self._masks[window, dtype]


def _may_attend(query: torch.Tensor, key: torch.Tensor, is_token: torch.Tensor, window: int | None) -> torch.Tensor:
    """Returns (rows, 1, queries, keys) bool: keys that are tokens, not after the query, and within the window.

    ``query`` and ``key`` hold positions.
    """
    distance = query[:, None, :, None] - key[:, None, None, :]
    allowed = (distance >= 0) & is_token[:, None, None, :]
    return allowed if window is None else allowed & (distance < window)


def pack(input_ids_BC: torch.Tensor, mask_BC: torch.Tensor, width: int) -> PackedRows:
    """Packs rows so that equal prompts, the first ``width`` columns, are kept once.

    Args:
        input_ids_BC: (B, C) token ids, prompts padded on the left, answers on the right.
        mask_BC: (B, C), 1 at tokens.
        width: W, the number of prompt columns.

    Raises:
        ValueError: no rows, a mask of another shape, a width outside [1, C], gaps in a row, a row without a prompt.
    """
    if input_ids_BC.ndim != 2 or mask_BC.shape != input_ids_BC.shape or len(mask_BC) == 0:
        shapes = f"{tuple(input_ids_BC.shape)} and {tuple(mask_BC.shape)}"
        raise ValueError(f"token ids and mask must both be (B, C) with a row or more, got {shapes}")
    if not 1 <= width <= mask_BC.shape[1]:
        raise ValueError(f"width={width} must be in [1, {mask_BC.shape[1]}], the columns of the prompts")
    is_token_BC = mask_BC.bool()
    n_columns = is_token_BC.shape[1]
    column_C = torch.arange(n_columns, device=is_token_BC.device)
    prompts = torch.where(is_token_BC[:, :width], input_ids_BC[:, :width], -1)
    _, prompt_B = torch.unique(prompts, dim=0, return_inverse=True)
    n_prompts = int(prompt_B.max()) + 1
    row_B = torch.arange(len(prompt_B), device=prompt_B.device)
    row_P = row_B.new_full((n_prompts,), len(row_B)).scatter_reduce_(0, prompt_B, row_B, "amin")

    lengths_B = (is_token_BC[:, :width].sum(1), is_token_BC[:, width:].sum(1))
    expected_BC = (column_C >= width - lengths_B[0][:, None]) & (column_C < width + lengths_B[1][:, None])
    if not torch.equal(is_token_BC, expected_BC) or int(lengths_B[0].min()) == 0:
        raise ValueError("rows with gaps, or without a prompt, can't be packed")

    kept_BC = is_token_BC.clone()
    kept_BC[:, :width] &= (row_P[prompt_B] == row_B)[:, None]
    token_S = kept_BC.flatten().nonzero().squeeze(1)  # in the order of the rows
    of_answer_S = token_S % n_columns >= width
    token_S = token_S[(prompt_B[token_S // n_columns] + n_prompts * of_answer_S).argsort(stable=True)]
    packed = token_S.new_full((kept_BC.numel(),), -1)
    packed[token_S] = torch.arange(len(token_S), device=packed.device)
    packed_BC = packed.view_as(kept_BC)
    packed_BC[:, :width] = packed_BC[row_P[prompt_B], :width]
    position_BC = (column_C - (width - lengths_B[0])[:, None]).clamp(min=0)
    longest = int((lengths_B[0] + lengths_B[1]).max())
    return PackedRows(token_S, packed_BC, position_BC, prompt_B, row_P, width, longest)
