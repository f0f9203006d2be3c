"""Counts how much of TRL's work an optimizer step runs: sequences, tokens, padding."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from accelerate import Accelerator

from trl_ext.schema import Sequences

from .rows import RowTable
from .step_plan import StepPlan


@dataclass(frozen=True)
class StepCounts:
    """The work of an optimizer step: what TRL would run, and (``_run``) what this trainer runs."""

    micro_batches: int
    sequences: int
    sequences_run: int
    positions: int  # tokens and padding
    positions_run: int
    tokens: int  # of prompts and completions, without padding
    tokens_run: int


def count_own(parts: list[Sequences]) -> StepCounts:
    """Counts the work of this rank if TRL's own micro-batches run."""
    sequences, positions = sum(map(len, parts)), sum(part.positions for part in parts)
    tokens = int(torch.stack([part.token_count for part in parts]).sum())
    return StepCounts(len(parts), sequences, sequences, positions, positions, tokens, tokens)


def count_planned(parts: list[Sequences], batches: list[Sequences], plan: StepPlan, table: RowTable) -> StepCounts:
    """Counts the work of this rank if ``plan``'s ``batches`` run in place of TRL's ``parts``."""
    packed = plan.positions(table)
    tokens_run = [n or int(table.length_B[row_B].sum()) for n, row_B in zip(packed, plan.batches, strict=True)]
    positions_run = [n or batch.positions for n, batch in zip(packed, batches, strict=True)]
    return StepCounts(
        micro_batches=len(batches),
        sequences=sum(map(len, parts)),
        sequences_run=sum(map(len, batches)),
        positions=sum(part.positions for part in parts),
        positions_run=sum(positions_run),
        tokens=int(table.length_B.sum()),
        tokens_run=sum(tokens_run),
    )


def over_ranks(counts: list[StepCounts], accelerator: Accelerator) -> StepCounts:
    """Sums the counts of an optimizer step's plans over all ranks; every rank has the same number of micro-batches."""
    step_total = torch.tensor([astuple(count) for count in counts]).sum(0, keepdim=True)
    if accelerator.num_processes == 1:  # without waiting for the device
        return StepCounts(*step_total[0].tolist())
    step_total = step_total.to(accelerator.device)
    gathered = accelerator.gather(step_total).cpu()
    return StepCounts(int(gathered[0, 0]), *gathered[:, 1:].sum(0).tolist())


def compute_metrics(counts: StepCounts) -> dict[str, float]:
    """Returns the metrics of an optimizer step that are logged under ``compute/``.

    * ``sequences_skipped_frac``, ``tokens_skipped_frac``: shares that don't run. A shared prompt counts as run once,
      and its other copies as skipped.
    * ``tokens_run``: prompt and completion tokens, over all ranks.
    * ``padding_removed_frac``: share of the padding that TRL would run.
    * ``micro_batches``: forward and backward passes of each rank.
    * ``flops_saved_frac``: share of the backbone's matrix products, which cost the same for every position, padding
      included. Attention, whose cost grows with the length, saves a little more.
    """
    padding, padding_run = counts.positions - counts.tokens, counts.positions_run - counts.tokens_run
    return {
        "compute/sequences_skipped_frac": 1 - counts.sequences_run / counts.sequences,
        "compute/tokens_skipped_frac": 1 - counts.tokens_run / max(counts.tokens, 1),
        "compute/tokens_run": float(counts.tokens_run),
        "compute/padding_removed_frac": 1 - padding_run / padding if padding else 0.0,
        "compute/micro_batches": float(counts.micro_batches),
        "compute/flops_saved_frac": 1 - counts.positions_run / max(counts.positions, 1),
    }
