"""Rows of TRL's per-sequence dict: joined, chosen in evenly long batches, without columns that are only padding.

Shapes: B sequences, T padded positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.loss.token_weights import live_tokens
from trl_ext.trl_surface import COLUMNS


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of the same widths as one; what isn't of a sequence is the first one's."""
    rows = dict(parts[0])
    for name, value in parts[0].items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            rows[name] = torch.cat([part[name] for part in parts])
        elif isinstance(value, list):
            rows[name] = [item for part in parts for item in part[name]]
    return rows


@dataclass(frozen=True)
class RowTable:
    """Lengths and flags of each row, (B,) int64, copied to the CPU once, so that planning waits for a GPU once.

    ``prompt_B``, ``answer_B``: tokens of prompt and completion; ``last_B``: the completion's columns up to its last
    token (a mask may have gaps); ``live_B``: tokens that the loss counts; ``id_B``: the prompt, -1 where there is none.
    ``wanted_B`` (B,) bool: to be run. ``gaps``: whether a row has one, or no prompt.
    """

    prompt_B: torch.Tensor
    answer_B: torch.Tensor
    last_B: torch.Tensor
    live_B: torch.Tensor
    id_B: torch.Tensor
    wanted_B: torch.Tensor
    gaps: bool

    @property
    def length_B(self) -> torch.Tensor:  # noqa: N802
        """(B,) tokens of prompt and completion."""
        return self.prompt_B + self.answer_B


def read_rows(rows: dict[str, Any], wanted_B: torch.Tensor) -> RowTable:
    """The table of TRL's dict; ``wanted_B`` (B,) bool: the rows to be run."""
    prompt_BT, answer_BT = rows["prompt_mask"], rows["completion_mask"]
    column_T = torch.arange(1, answer_BT.shape[1] + 1, device=answer_BT.device)
    nothing_B = answer_BT.new_zeros(len(answer_BT))
    gap_B = (prompt_BT.diff(dim=1) < 0).any(1) | (answer_BT.diff(dim=1) > 0).any(1) | (prompt_BT[:, -1] == 0)
    columns = [
        prompt_BT.sum(1),
        answer_BT.sum(1),
        (answer_BT * column_T).amax(1) if answer_BT.shape[1] else nothing_B,
        live_tokens(rows),
        rows.get("prompt_id", nothing_B - 1),
        wanted_B,
        gap_B,
    ]
    table = torch.stack([column.to(answer_BT.device, torch.int64) for column in columns]).cpu()
    prompt_B, answer_B, last_B, live_B, id_B, wanted_B, gap_B = table.unbind(0)
    return RowTable(prompt_B, answer_B, last_B, live_B, id_B, wanted_B.bool(), bool(gap_B.any()))


def even_batches(
    wanted_B: torch.Tensor, length_B: torch.Tensor, n_batches: int, empty_B: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The rows (indices) of each of ``n_batches``: the wanted ones, sorted by length, in even numbers.

    Where fewer are wanted than there are batches, the shortest of the others make up for them, those without a token
    that counts (``empty_B``) last of all. Longest first: a run that is out of memory is so at once.
    """
    order_B = length_B.argsort(descending=True, stable=True)
    chosen = order_B[wanted_B[order_B]]
    if len(chosen) < n_batches:
        others = order_B[~wanted_B[order_B]]
        if empty_B is not None:
            others = torch.cat([others[empty_B[others]], others[~empty_B[others]]])
        chosen = torch.cat([chosen, others[len(others) - (n_batches - len(chosen)) :]])
    return list(chosen.tensor_split(n_batches))


def select(
    rows: dict[str, Any],
    index_B: torch.Tensor,
    table: RowTable | None = None,
    trim: tuple[bool, bool] = (False, False),
    multiple_of: int | None = None,
) -> dict[str, Any]:
    """These rows, without the columns that are padding in all of them.

    ``trim``: whether prompts' and completions' columns may go, by the ``table``; ``multiple_of``: TRL's
    ``pad_to_multiple_of``.
    """
    n_rows, prompt_width = rows["prompt_ids"].shape
    completion_width = rows["completion_ids"].shape[1]
    prompt, completion = prompt_width, completion_width
    if trim[0] and table is not None:
        longest = int(table.prompt_B[index_B].max())
        prompt = _up_to_multiple(max(longest, 1), multiple_of, prompt_width)
    if trim[1] and table is not None:
        last = int(table.last_B[index_B].max())
        completion = _up_to_multiple(max(last, 1), multiple_of, completion_width)
    chosen = {}
    for name, value in rows.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == n_rows:
            value = value[index_B]
            side = COLUMNS[name].side if name in COLUMNS else None
            if side == "left":
                value = value[:, prompt_width - prompt :]
            elif side == "right" and value.shape[1] == completion_width:
                value = value[:, :completion]
            elif side == "both":
                value = value[:, prompt_width - prompt : prompt_width + completion]
        elif isinstance(value, list) and len(value) == n_rows:
            value = [value[i] for i in index_B.tolist()]
        chosen[name] = value
    return chosen


def dead_rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of advantage 0 that have a token that counts, as a batch; none where there is none, or tokens have
    advantages of their own."""
    if batch["advantages"].dim() != 1:
        return []
    mask_BT = batch["completion_mask"] * batch.get("tool_mask", 1)
    dead_B = ((batch["advantages"] == 0) & mask_BT.bool().any(dim=1)).nonzero().squeeze(1)
    return [select(batch, dead_B)] if len(dead_B) else []


def _up_to_multiple(width: int, multiple_of: int | None, most: int) -> int:
    return width if multiple_of is None else min(most, -(-width // multiple_of) * multiple_of)
