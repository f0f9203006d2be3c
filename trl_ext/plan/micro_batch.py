"""Defines what is planned together, and the note that a micro-batch carries in TRL's dict.

Shapes: B sequences of this rank that are planned together; P prompts, G completions of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_ext.compat import LossSettings
from trl_ext.objective.interface import Method
from trl_ext.schema import Sequences

from .rows import RowTable
from .step_plan import StepPlan
from .step_statistics import StepStatistics

KEY = "micro_batch"  # in TRL's dict


@dataclass(frozen=True)
class MicroBatch:
    """The position of a micro-batch in its plan. TRL's dict of the micro-batch holds it under ``KEY``.

    Attributes:
        runs: False if nothing runs at this call; the dict then holds nothing else.
        row_B: indices of these rows among the planned sequences; None for TRL's own micro-batch (also in evaluation).
        last: whether this is the last micro-batch of the plan.
        statistics: where the plan's statistics are collected; None in TRL's own micro-batch.
        packed: number of packed positions if each prompt runs once; else 0.
        skipped: in the last micro-batch, our columns of the sequences that run in none.
        not_run: in the last micro-batch, these sequences as batches, if ``what_if_dead`` needs them.
        method: the normalisation that the kernel may compute from the group's rewards; None: it takes the batch's
            advantages.
    """

    runs: bool = True
    row_B: torch.Tensor | None = None
    last: bool = False
    statistics: StepStatistics | None = None
    packed: int = 0
    skipped: Sequences | None = None
    not_run: list[Sequences] = field(default_factory=list)
    method: Method | None = None

    @property
    def is_trls(self) -> bool:
        """Whether this is one of TRL's own micro-batches, not a regrouped one."""
        return self.row_B is None


NOTHING = MicroBatch(runs=False)


def micro_batch(batch: Mapping[str, Any]) -> MicroBatch:
    """Reads the ``MicroBatch`` from TRL's dict; the default is a micro-batch of TRL's own."""
    return batch.get(KEY, MicroBatch())


@dataclass(frozen=True)
class StepRequest:
    """What a plan depends on in addition to TRL's micro-batches.

    Attributes:
        advantages_PG: our advantages of the latest generation, of all ranks, with which the batch's are compared to
            detect changes by a subclass or callback; None if there are none.
        method: the normalisation, if the kernel can compute it from a group's rewards and no subclass overrides the
            loss; else None.
        override: the reason to log if a subclass overrides a method of ``rules.OWN_METHODS``; else None.
        by_sequence: whether each sequence's gradient is recorded by itself, which rules out sharing prompts.
    """

    settings: LossSettings
    advantages_PG: torch.Tensor | None
    method: Method | None
    override: str | None
    by_sequence: bool


@dataclass
class PlannedRows:
    """The sequences of a generation batch that are planned together, and their plan.

    Attributes:
        parts: TRL's micro-batches.
        rows, table: their sequences, joined.
        request: what the plan depends on in addition.
        all_run: whether every sequence runs.
        restore_random: restores the random states in which the plan began.
        statistics: of the sequences.
    """

    parts: list[Sequences]
    rows: Sequences
    table: RowTable
    request: StepRequest
    all_run: bool
    restore_random: Callable[[], None]
    plan: StepPlan = field(default_factory=lambda: StepPlan(()))
    statistics: StepStatistics | None = None
