"""The layout of rows that share prompts: ``[prompt][answer 1]...[answer G]`` one prompt after the other, no padding.

Shapes: B sequences of a micro-batch, W prompt columns (padded on the left), R completion columns, C = W + R, S packed
tokens, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

KEYWORD = "packed_rows"  # under which layers hand it down
PADDING, SHORT = 1.2, 48  # answers that run together: at most so much padding, or so short


@dataclass(frozen=True)
class Block:
    """A prompt and its answers, as they stand in the row: the prompt from ``start``, answers from ``answers`` to
    ``end``. ``own``: (g, R) places in the row of answers of about the same length, -1 behind an answer's end."""

    start: int
    answers: int
    end: int
    own: list[torch.Tensor]


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
    _blocks: list[Block] = field(default_factory=list)

    def blocks(self) -> list[Block]:
        """Of each prompt."""
        if not self._blocks:
            answers = self.packed_BC[:, self.width :]
            length_B = (answers >= 0).sum(1)
            for prompt, row in enumerate(self.row_P.tolist()):
                members = (self.prompt_B == prompt).nonzero().squeeze(1)
                members = members[length_B[members].argsort()]
                lengths = length_B[members].tolist()
                chunks, begin = [], 0
                for i in range(1, len(lengths) + 1):
                    padded = (i + 1 - begin) * lengths[min(i, len(lengths) - 1)]
                    full = padded > PADDING * sum(lengths[begin : i + 1]) and lengths[min(i, len(lengths) - 1)] > SHORT
                    if i == len(lengths) or full:
                        if lengths[i - 1]:
                            chunks.append(answers[members[begin:i], : lengths[i - 1]])
                        begin = i
                end_of_prompt = int(self.packed_BC[row, self.width - 1]) + 1
                start = end_of_prompt - int((self.packed_BC[row, : self.width] >= 0).sum())
                self._blocks.append(Block(start, end_of_prompt, end_of_prompt + sum(lengths), chunks))
        return self._blocks

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
    token_S = kept_BC.flatten().nonzero().squeeze(1)  # by row, a prompt before its first answer
    token_S = token_S[prompt_B[token_S // n_columns].argsort(stable=True)]  # by prompt
    packed = token_S.new_full((kept_BC.numel(),), -1)
    packed[token_S] = torch.arange(len(token_S), device=packed.device)
    packed_BC = packed.view_as(kept_BC)
    packed_BC[:, :width] = packed_BC[row_P[prompt_B], :width]
    position_BC = (column_C - (width - lengths_B[0])[:, None]).clamp(min=0)
    longest = int((lengths_B[0] + lengths_B[1]).max())
    return PackedRows(token_S, packed_BC, position_BC, prompt_B, row_P, width, longest)
