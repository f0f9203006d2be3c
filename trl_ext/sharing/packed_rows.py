"""Packs a micro-batch into one row without padding: all prompts once, then all answers in the order of their prompts.

Shapes: B sequences of a micro-batch, W prompt columns (padded on the left), R completion columns, C = W + R, S packed
tokens, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

KEYWORD = "packed_rows"  # the keyword argument by which layers pass the PackedRows to attention
LENGTHS, LONGEST = "packed_lengths", "packed_longest"  # those of compiled layers: PackedRows.table(), .longest


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


def spans_of(prompts: list[int], of_prompts: list[int], answers: list[int]) -> tuple[Spans, Spans]:
    """Returns two spans: prompts and answers attend to themselves, and answers to their prompts.

    Args:
        prompts, of_prompts, answers: tokens of each prompt, of all its answers together, and of each answer.
    """
    end = sum(prompts)
    whole, first, last = slice(0, end + sum(answers)), slice(0, end), slice(end, end + sum(answers))
    own = [*prompts, *answers]
    return Spans(whole, whole, own, own, causal=True), Spans(last, first, of_prompts, prompts, causal=False)


@dataclass
class PackedRows:
    """The layout of a packed row.

    Attributes:
        token_S: (S,), the index of each packed token in the flattened (B, C) rows. The row may end with padding, which
            has the indices of the first token. No other token attends to it.
        packed_BC: (B, C), the packed index of each token, -1 at padding; sequences of a prompt share its indices.
        position_BC: (B, C), the position of each token in its sequence.
        prompt_B: (B,), which of the P prompts a sequence has.
        row_P: (P,), the sequence from which a prompt's tokens are taken.
        width: W.
        longest: the most tokens of a prompt with one of its answers.
        lengths: tokens of each prompt, of all its answers together, and of each answer in the order of the prompts.
        windows: the sliding windows that layers have passed to attention; the probe reads them.
    """

    token_S: torch.Tensor
    packed_BC: torch.Tensor
    position_BC: torch.Tensor
    prompt_B: torch.Tensor
    row_P: torch.Tensor
    width: int
    longest: int
    lengths: tuple[list[int], list[int], list[int]]
    windows: set[int | None] = field(default_factory=set)
    _masks: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _spans: tuple[Spans, Spans] | None = None
    _table: torch.Tensor | None = None

    def spans(self) -> tuple[Spans, Spans]:
        """Returns the spans of the prompts and answers (``spans_of``)."""
        if self._spans is None:
            self._spans = spans_of(*self.lengths)
        return self._spans

    def table(self) -> torch.Tensor:
        """Returns the lengths as one tensor on the CPU, for ``operators.py``.

        It has the number of prompts, that of answers, and ``lengths``. Zeros fill it up to a power of two, so that few
        sizes occur.
        """
        if self._table is None:
            prompts, of_prompts, answers = self.lengths
            values = [len(prompts), len(answers), *prompts, *of_prompts, *answers]
            self._table = torch.zeros(max(64, 1 << (len(values) - 1).bit_length()), dtype=torch.int64)
            self._table[: len(values)] = torch.tensor(values)
        return self._table

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


def pack(
    input_ids_BC: torch.Tensor, mask_BC: torch.Tensor, width: int, size_of: Callable[[int], int] = lambda n: n
) -> PackedRows:
    """Packs rows so that equal prompts, the first ``width`` columns, are kept once.

    Args:
        input_ids_BC: (B, C) token ids, prompts padded on the left, answers on the right.
        mask_BC: (B, C), 1 at tokens.
        width: W, the number of prompt columns.
        size_of: returns the size of a row for so many tokens; the row is padded to it.

    Raises:
        ValueError: no rows, a mask of another shape, a width outside [1, C], gaps in a row, a row without a prompt.
    """
    if input_ids_BC.ndim != 2 or mask_BC.shape != input_ids_BC.shape or len(mask_BC) == 0:
        shapes = f"{tuple(input_ids_BC.shape)} and {tuple(mask_BC.shape)}"
        raise ValueError(f"token ids and mask must both be (B, C) with a row or more, got {shapes}")
    if not 1 <= width <= mask_BC.shape[1]:
        raise ValueError(f"width={width} must be in [1, {mask_BC.shape[1]}], the columns of the prompts")
    is_token_BC = mask_BC.bool()
    n_columns, device = is_token_BC.shape[1], is_token_BC.device
    column_C = torch.arange(n_columns, device=device)
    prompts = torch.where(is_token_BC[:, :width], input_ids_BC[:, :width], -1)
    _, prompt_B = torch.unique(prompts, dim=0, return_inverse=True)
    lengths_B = (is_token_BC[:, :width].sum(1), is_token_BC[:, width:].sum(1))
    expected_BC = (column_C >= width - lengths_B[0][:, None]) & (column_C < width + lengths_B[1][:, None])
    gap_B = (is_token_BC != expected_BC).any(1)
    layout = _layout(torch.stack([*lengths_B, prompt_B, gap_B]).cpu(), width, n_columns)  # the only other read

    parts = layout.token_S, layout.row_P
    token_S, row_P = _send(torch.cat(parts), device).split([len(part) for part in parts])
    packed = token_S.new_full((is_token_BC.numel(),), -1)
    packed[token_S] = torch.arange(len(token_S), device=device)
    token_S = torch.cat([token_S, token_S[:1].expand(size_of(len(token_S)) - len(token_S))])
    packed_BC = packed.view_as(is_token_BC)
    packed_BC[:, :width] = packed_BC[row_P[prompt_B], :width]
    position_BC = (column_C - (width - lengths_B[0])[:, None]).clamp(min=0)
    return PackedRows(token_S, packed_BC, position_BC, prompt_B, row_P, width, layout.longest, layout.lengths)


@dataclass(frozen=True)
class _Layout:
    """The part of a ``PackedRows`` that is computed on the CPU."""

    token_S: torch.Tensor
    row_P: torch.Tensor
    longest: int
    lengths: tuple[list[int], list[int], list[int]]


def _layout(table: torch.Tensor, width: int, n_columns: int) -> _Layout:
    """Lays out a packed row. ``table`` (4, B): tokens of prompt and answer, the prompt's number, whether gaps exist."""
    prompt_length_B, answer_length_B, prompt_B, gap_B = table
    if bool(gap_B.any()) or int(prompt_length_B.min()) == 0:
        raise ValueError("rows with gaps, or without a prompt, can't be packed")
    n_prompts, row_B = int(prompt_B.max()) + 1, torch.arange(len(prompt_B))
    row_P = row_B.new_full((n_prompts,), len(row_B)).scatter_reduce_(0, prompt_B, row_B, "amin")
    by_prompt_B = prompt_B.argsort(stable=True)
    length_P, answers_B = prompt_length_B[row_P], answer_length_B[by_prompt_B]
    begins = torch.cat([row_P * n_columns + width - length_P, by_prompt_B * n_columns + width])
    lengths = torch.cat([length_P, answers_B])
    offsets = (begins - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
    of_prompt_P = answer_length_B.new_zeros(n_prompts).index_add_(0, prompt_B, answer_length_B)
    return _Layout(
        token_S=offsets + torch.arange(len(offsets)),
        row_P=row_P,
        longest=int((prompt_length_B + answer_length_B).max()),
        lengths=(length_P.tolist(), of_prompt_P.tolist(), answers_B.tolist()),
    )


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor to ``device``, without waiting for what a GPU still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
