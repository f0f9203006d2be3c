"""Packs sequences that share prompts into micro-batches: groups stay together, within a budget of tokens.

Shapes: B sequences of this rank.
"""

from __future__ import annotations

import torch

from .rows import RowTable, even_batches

CANNOT_SHARE = 1 << 40  # the number of micro-batches that a rank reports if its rows can't be packed
# Memory of a copied prompt token's keys and values, relative to a token that runs: 2 of the about 14 tensors of hidden
# width that a layer keeps. Estimated, not measured. Attention in parts (attention.py) copies nothing.
COPIED = 0.15


def largest(batches: list[torch.Tensor], table: RowTable) -> int:
    """Returns the positions (tokens and padding) of the largest of these batches."""
    return max(len(rows) * int(table.prompt_B[rows].max() + table.answer_B[rows].max()) for rows in batches)


def packed_positions(rows_B: torch.Tensor, table: RowTable) -> int:
    """Returns the number of tokens of these sequences, with each prompt counted once."""
    first = {prompt: row for row, prompt in zip(rows_B.tolist(), table.id_B[rows_B].tolist(), strict=True)}
    return int(table.answer_B[rows_B].sum() + table.prompt_B[list(first.values())].sum())


def shared_batches(table: RowTable, budget: int) -> list[list[int]]:
    """Packs the wanted rows into micro-batches of at most ``budget`` tokens; returns the rows of each.

    A prompt counts once, plus the copies of its keys and values. A group larger than the budget is split. First fit,
    with the largest group first.
    """
    ids, prompts, answers = (column_B.tolist() for column_B in (table.id_B, table.prompt_B, table.answer_B))
    groups: dict[int, list[int]] = {}
    for row in table.wanted_B.nonzero().squeeze(1).tolist():
        groups.setdefault(ids[row], []).append(row)
    pieces: list[tuple[float, list[int]]] = []
    for rows in groups.values():
        cost, piece = 0.0, list[int]()
        for row in sorted(rows, key=lambda row: -answers[row]):
            own = answers[row] + COPIED * prompts[row]
            if piece and cost + own > budget:
                pieces.append((cost, piece))
                piece = []
            cost = cost + own if piece else prompts[row] + own
            piece.append(row)
        pieces.append((cost, piece))
    filled: list[float] = []
    batches: list[list[int]] = []
    for cost, piece in sorted(pieces, key=lambda piece: -piece[0]):
        place = next((i for i, full in enumerate(filled) if full + cost <= budget), None)
        if place is None:
            filled.append(cost)
            batches.append(piece)
        else:
            filled[place] += cost
            batches[place] += piece
    return batches


def split_into(batches: list[list[int]], n_batches: int, table: RowTable) -> list[torch.Tensor]:
    """Splits ``batches`` until there are ``n_batches``, the number of the rank with the most.

    It halves the batch with the most rows. If there are fewer rows than ``n_batches``, rows without a gradient fill up.
    """
    batches = [list(rows) for rows in batches]
    while len(batches) < n_batches and any(len(rows) > 1 for rows in batches):
        rows = max(batches, key=len)
        batches.remove(rows)
        batches += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    if len(batches) < n_batches:
        return even_batches(table, n_batches)
    return [torch.tensor(rows) for rows in batches]
