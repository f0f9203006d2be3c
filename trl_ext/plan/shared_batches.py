"""Micro-batches of sequences that share prompts: whole groups together, up to a budget of tokens.

Shapes: B sequences of this rank.
"""

from __future__ import annotations

import torch

from .rows import RowTable, even_batches

CAN_NOT = 1 << 40  # micro-batches, of a rank whose rows can't share
# of a position's memory, what a copy of a prompt's keys and values takes: reckoned (2 of about 14 tensors of the hidden
# width that a layer keeps), not measured; in parts, on a CPU, nothing is copied
COPIED = 0.15


def largest(batches: list[torch.Tensor], table: RowTable) -> int:
    """Positions of the largest of these batches with padding."""
    return max(len(rows) * int(table.prompt_B[rows].max() + table.answer_B[rows].max()) for rows in batches)


def packed_positions(rows_B: torch.Tensor, table: RowTable) -> int:
    """Tokens of these sequences, each prompt once."""
    first = {prompt: row for row, prompt in zip(rows_B.tolist(), table.id_B[rows_B].tolist(), strict=True)}
    return int(table.answer_B[rows_B].sum() + table.prompt_B[list(first.values())].sum())


def shared_batches(table: RowTable, budget: int) -> list[list[int]]:
    """The rows of each micro-batch, of the wanted ones: prompts once, with copies of their keys and values, within the
    budget; a group that is larger is split. First fit, the largest first."""
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


def as_many(batches: list[list[int]], n_batches: int, table: RowTable) -> list[torch.Tensor]:
    """``n_batches`` of them, as another process has: the largest are split, and where there aren't as many sequences,
    others that have no gradient make up for them."""
    batches = [list(rows) for rows in batches]
    while len(batches) < n_batches and any(len(rows) > 1 for rows in batches):
        rows = max(batches, key=len)
        batches.remove(rows)
        batches += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    if len(batches) < n_batches:
        return even_batches(table, n_batches)
    return [torch.tensor(rows) for rows in batches]
