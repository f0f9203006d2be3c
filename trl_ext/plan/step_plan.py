"""Which rows run in which micro-batch: a pure function of the rows' lengths.

Shapes: B sequences of all micro-batches that are planned together, on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .rows import RowTable, even_batches
from .shared_batches import CAN_NOT, as_many, largest, packed_positions, shared_batches

NOT_PACKABLE = "Prompts aren't shared in a batch whose rows have gaps, or more than token ids."


@dataclass(frozen=True)
class PlanLimits:
    """``rows``: sequences of a micro-batch, where prompts aren't shared. ``least``, ``most``: micro-batches. ``share``:
    whether each prompt may run once; ``tokens``: then packed tokens of a micro-batch, None: as many as the largest
    would hold without."""

    rows: int
    least: int = 0
    most: float = math.inf
    share: bool = False
    tokens: int | None = None


@dataclass(frozen=True)
class StepPlan:
    """``batches``: the rows of each micro-batch, as many on every rank. ``shared``: each prompt runs once in them.
    ``not_shared``: why prompts that might be shared aren't, or None."""

    batches: tuple[torch.Tensor, ...]
    shared: bool = False
    not_shared: str | None = None

    def left_out(self, table: RowTable) -> torch.Tensor:
        """(B,) bool: rows in none of the micro-batches."""
        left_B = torch.ones_like(table.wanted_B)
        for row_B in self.batches:
            left_B[row_B] = False
        return left_B

    def positions(self, table: RowTable) -> list[int]:
        """Of each micro-batch, the packed positions; 0 where prompts aren't shared."""
        return [packed_positions(row_B, table) if self.shared else 0 for row_B in self.batches]


def plan_step(table: RowTable, limits: PlanLimits, most_over_ranks: Callable[[int], int] = lambda number: number):
    """Puts the wanted rows into as few evenly long micro-batches as the limits allow.

    Every rank gets as many: one with fewer live sequences runs its shortest dead ones in their place, whose gradient is
    0, so that DDP and FSDP2 meet. ``most_over_ranks`` gives the largest of the ranks' numbers.
    """
    needed = -(-int(table.wanted_B.sum()) // limits.rows)
    unshared = tuple(even_batches(table, max(limits.least, most_over_ranks(needed))))
    if not limits.share or not unshared:
        return StepPlan(unshared)
    batches: list[list[int]] = []
    if table.packable:
        batches = shared_batches(table, limits.tokens or largest(list(unshared), table))
    n_batches = max(limits.least, most_over_ranks(len(batches) if table.packable else CAN_NOT))
    if n_batches >= CAN_NOT:
        return StepPlan(unshared, not_shared=NOT_PACKABLE)
    if n_batches > limits.most:
        reason = f"Prompts aren't shared where that takes more than {limits.most} micro-batches."
        return StepPlan(unshared, not_shared=reason)
    return StepPlan(tuple(as_many(batches, n_batches, table)), shared=True)
