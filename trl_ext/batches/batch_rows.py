"""Rows of TRL's per-sequence dict: joined, chosen in evenly long batches, without columns that are only padding.

Shapes: B sequences, T padded positions.
"""

from __future__ import annotations

from typing import Any

import torch

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


def row_lengths(rows: dict[str, Any]) -> torch.Tensor:
    """(B,) tokens of prompt and completion, int64."""
    return rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)


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
    rows: dict[str, Any], index_B: torch.Tensor, trim: tuple[bool, bool], multiple_of: int | None = None
) -> dict[str, Any]:
    """These rows, without the columns that are padding in all of them.

    ``trim``: whether prompts' and completions' columns may go; ``multiple_of``: TRL's ``pad_to_multiple_of``.
    """
    n_rows, prompt_width = rows["prompt_ids"].shape
    completion_width = rows["completion_ids"].shape[1]
    prompt, completion = prompt_width, completion_width
    if trim[0]:
        longest = int(rows["prompt_mask"][index_B].sum(1).max())
        prompt = _up_to_multiple(max(longest, 1), multiple_of, prompt_width)
    if trim[1]:
        place_T = torch.arange(1, completion_width + 1, device=index_B.device)
        last = int((rows["completion_mask"][index_B] * place_T).max())  # a mask may have gaps
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
    return [select(batch, dead_B, (False, False))] if len(dead_B) else []


def _up_to_multiple(width: int, multiple_of: int | None, most: int) -> int:
    return width if multiple_of is None else min(most, -(-width // multiple_of) * multiple_of)
