"""Assigns rows to micro-batches, as a pure function of the rows' lengths.

Shapes: B sequences of this rank that are planned together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .rows import RowTable, even_batches
from .shared_batches import CANNOT_SHARE, largest, packed_positions, shared_batches, split_into

NOT_PACKABLE = "Prompts aren't shared in a batch whose rows have gaps, token types or no prompt ids."


@dataclass(frozen=True)
class PlanLimits:
    """The limits of a plan.

    Attributes:
        rows: sequences of a micro-batch, if prompts aren't shared.
        least, most: number of micro-batches.
        share: whether prompts may be shared.
        tokens: packed tokens of a micro-batch, if prompts are shared; None: the positions of the largest micro-batch
            without sharing.
    """

    rows: int
    least: int = 0
    most: float = math.inf
    share: bool = False
    tokens: int | None = None


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of an optimizer step.

    Attributes:
        batches: row indices of each micro-batch; every rank has the same number of micro-batches.
        shared: whether each prompt runs once per micro-batch.
        not_shared: the reason to log if the limits allow sharing and this batch doesn't; else None.
    """

    batches: tuple[torch.Tensor, ...]
    shared: bool = False
    not_shared: str | None = None

    def left_out(self, table: RowTable) -> torch.Tensor:
        """Returns (B,) bool: the rows in none of the micro-batches."""
        left_B = torch.ones_like(table.wanted_B)
        for row_B in self.batches:
            left_B[row_B] = False
        return left_B

    def positions(self, table: RowTable) -> list[int]:
        """Returns the number of packed positions of each micro-batch; 0 if prompts aren't shared."""
        return [packed_positions(row_B, table) if self.shared else 0 for row_B in self.batches]


def plan_step(
    table: RowTable, limits: PlanLimits, most_over_ranks: Callable[[int], int] = lambda number: number
) -> StepPlan:
    """Puts the wanted rows, sorted by length, into as few micro-batches as the limits allow.

    Every rank gets the same number of micro-batches, because DDP and FSDP2 synchronise in each. A rank with too few
    live sequences also runs its shortest dead ones, whose gradient is 0.

    Args:
        most_over_ranks: returns the largest of all ranks' numbers.
    """
    needed = -(-int(table.wanted_B.sum()) // limits.rows)
    unshared = tuple(even_batches(table, max(limits.least, most_over_ranks(needed))))
    if not limits.share or not unshared:
        return StepPlan(unshared)
    batches: list[list[int]] = []
    if table.packable:
        batches = shared_batches(table, limits.tokens or largest(list(unshared), table))
    n_batches = max(limits.least, most_over_ranks(len(batches) if table.packable else CANNOT_SHARE))
    if n_batches >= CANNOT_SHARE:
        return StepPlan(unshared, not_shared=NOT_PACKABLE)
    if n_batches > limits.most:
        reason = f"Prompts aren't shared where that takes more than {limits.most} micro-batches."
        return StepPlan(unshared, not_shared=reason)
    return StepPlan(tuple(split_into(batches, n_batches, table)), shared=True)
