"""A logged step on this rank: ``OpenStep`` while its passes run, ``Logged`` once it is measured.

Shapes: B sequences of the step on this rank, P prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.inner_products import squared_norms

from .collectives import Collectives
from .files import StepExtras, write_step
from .layer_check import LayerCheck
from .measure import MeasuredStep, RecordedStep
from .row_columns import RowColumns
from .sequence_table import SequenceTable
from .step_groups import StepGroups, number_groups
from .what_if_step import WhatIfTable


@dataclass
class OpenStep:
    """The open logged step on this rank.

    Attributes:
        fresh: whether its prompts weren't trained on in an earlier step.
        columns: its micro-batches so far.
        idle: sequences that no forward runs, because their gradient is 0.
        extra: sequences of advantage 0 that were recorded once more, at an advantage of 1, after all others.
        check: the comparison with the gradients, once it was made.
    """

    fresh: bool
    columns: list[RowColumns] = field(default_factory=list)
    idle: list[SequenceTable] = field(default_factory=list)
    extra: SequenceTable | None = None
    check: LayerCheck | None = None

    def check_passes(self, sketch: GradientSketch, log_once: Callable[[str], None]) -> None:
        """Names rows without a pass. Raises ``RuntimeError`` if a pass had no rows of its own."""
        if sketch.ran_again:
            raise RuntimeError("a forward pass followed the backward of its rows: call rows() before each forward pass")
        idle = [self.columns[i].table for i in sketch.without_pass if i < len(self.columns)]
        if any(table.advantage.any() for table in idle):
            log_once(
                "rows() was called without a forward pass after it, or twice before one: interference counts these "
                "sequences as if their gradient were 0."
            )

    def take(self, sketch: GradientSketch, processes: int, loss_scale: float) -> RecordedStep:
        """Ends the sketch's step, and returns what this rank recorded.

        Sketches and coefficients are divided by the number of ranks, as DDP divides gradients.
        """
        if not self.columns:
            raise ValueError("the step has no sequences: call recorder.rows() before each forward pass")
        taken = sketch.take()
        ran = [columns.table for columns in self.columns]
        n_run, n_idle = sum(map(len, ran)), sum(map(len, self.idle))
        table = SequenceTable.join([*ran, *self.idle]).to(taken.sketch.device)
        sketch_BMN, extra_BMN = taken.sketch[:n_run], taken.sketch[n_run:]
        if n_idle:
            sketch_BMN = torch.cat([sketch_BMN, sketch_BMN.new_zeros(n_idle, *sketch_BMN.shape[1:])])
        if self.extra is not None and table.coefficient is not None:
            table = place_scores(table, sketch_BMN, self.extra.to(sketch_BMN.device), extra_BMN)
        sketch_BMN.div_(processes * loss_scale)
        coefficient_B = None if table.coefficient is None else table.coefficient / processes
        table = replace(table, square=squared_norms(sketch_BMN.flatten(1)), coefficient=coefficient_B)
        return RecordedStep(sketch_BMN, taken.sections, table, features_PH=None)

    def number_groups(
        self, recorded: RecordedStep, counts: Sequence[int], collectives: Collectives
    ) -> StepGroups | None:
        """Numbers the groups of all ranks in ``recorded``, and returns them. A collective.

        None: they have numbers already.
        """
        sizes = [columns.group_size for columns in self.columns if columns.group_size is not None]
        if not sizes:
            return None
        sizes_B = torch.cat(sizes).to(recorded.sketch_BMN.device)
        recorded.sequences, groups = number_groups(recorded.sequences, sizes_B, counts, collectives)
        return groups


def place_scores(
    table: SequenceTable, sketch_B: torch.Tensor, extra: SequenceTable, extra_B: torch.Tensor
) -> SequenceTable:
    """Copies the sketches of ``OpenStep.extra`` into the rows of the same sequences.

    Args:
        table, sketch_B: the step's sequences and their sketches (B, ...), which are changed in place.
        extra, extra_B: those that were recorded once more.

    Returns:
        ``table`` with the coefficients of ``extra``.
    """
    assert table.coefficient is not None and extra.coefficient is not None
    answers = table.group_rewards.shape[1]
    identity_B = table.prompt_id * answers + table.position
    order_B = identity_B.argsort()
    extra_identity = extra.prompt_id * answers + extra.position
    at = order_B[torch.searchsorted(identity_B[order_B], extra_identity)]
    sketch_B[at] = extra_B
    coefficient_B = table.coefficient.index_copy(0, at, extra.coefficient.to(table.coefficient))
    return replace(table, score_advantage=table.score_advantage.index_fill(0, at, 1.0), coefficient=coefficient_B)


@dataclass(frozen=True)
class Logged:
    """A measured step: what its file holds."""

    number: int
    found: MeasuredStep
    metrics: dict[str, float]
    what_if: WhatIfTable | None

    def prompt_keys(self) -> torch.Tensor:
        """Returns (P,) int64: each prompt's key (the user's group id), in the order of prompt ids."""
        groups, key_B = self.found.groups, self.found.sequences.prompt_key
        return key_B.new_zeros(len(groups.prompt_P)).scatter_(0, groups.row_B, key_B)

    def write(
        self,
        folder: str | os.PathLike[str],
        texts: Mapping[int, str] | None,
        tasks: Mapping[int, str],
        *,
        by_part: bool,
        started: float,
    ) -> Path:
        """Writes the step's file, and returns its path.

        Args:
            folder: the run's folder.
            texts, tasks: of the prompts, by key.
            by_part: whether the file gets the inner products in each part of the model.
            started: as in ``InterferenceRecord``.
        """
        found, keys = self.found, self.prompt_keys().tolist()
        more = StepExtras(
            found.sequences,
            found.products.scores,
            self.what_if,
            found.products.grams_PP if by_part else None,
            [tasks.get(key, "") for key in keys] if tasks else None,
            started,
        )
        named = None if texts is None else [texts.get(key, "") for key in keys]
        return write_step(folder, self.number, found.step, self.metrics, keys, named, more=more, groups=found.groups)
