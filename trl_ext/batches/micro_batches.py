"""The micro-batches of an optimizer step, holding only what has a gradient.

Flow: TRL's own micro-batches -> the weight of each sequence's tokens in them (``token_weights.py``) -> sequences with a
gradient (``skipping.py``), in as few evenly long micro-batches as hold them, padding trimmed (``batch_rows.py``) -> the
loss (``fused_loss.py``), whose statistics come back, to be logged of TRL's own micro-batches (``step_statistics.py``).

Shapes: B sequences of all micro-batches that are planned together, on this process.

TRL calls ``training_step`` once for each of its micro-batches. Of n calls the last m <= n get a micro-batch here, the
same m on every process, so that the last one synchronises as TRL's does; the others get none. A process with fewer live
sequences than m runs its shortest dead ones in their place: their gradient is 0, and DDP and FSDP2 meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType

from trl_ext.loss.fused_loss import live_mask, token_weights_now
from trl_ext.loss.token_weights import live_tokens

from .batch_rows import even_batches, join, row_lengths, select
from .deferred_logprobs import logprobs_of_rows
from .skipping import has_dropout, trimmed_columns, what_runs
from .step_statistics import StepStatistics

NOTHING = "nothing_to_run"  # the key of a micro-batch that isn't run


@dataclass(frozen=True)
class StepCounts:
    """Of an optimizer step, over all processes: what TRL would run, and what runs here."""

    micro_batches: int
    sequences: int
    sequences_run: int
    tokens: int  # prompts and completions, no padding
    tokens_run: int
    positions: int  # with padding
    positions_run: int


def compute_metrics(counts: StepCounts) -> dict[str, float]:
    """What is logged under ``compute/``.

    ``sequences_skipped_frac``, ``tokens_skipped_frac``: shares that don't run. ``tokens_run``: prompt and completion
    tokens, of all processes. ``padding_removed_frac``: of the padding that TRL would run. ``micro_batches``: forward
    and backward passes of each process. ``flops_saved_frac``: of the backbone's matrix products, the same for every
    position, padding or not (a forward alone, for ``full_entropy``, counts a third); attention, which grows with the
    length, saves a little more than this.
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


def sequences(batch: dict[str, Any]) -> int:
    """Rows of a batch."""
    return len(batch["prompt_ids"])


def tokens(batch: dict[str, Any]) -> int:
    """Of prompts and completions, padding left out."""
    return int(row_lengths(batch).sum())


def positions(batch: dict[str, Any]) -> int:
    """Token positions that the backbone sees, padding included."""
    return batch["prompt_ids"].numel() + batch["completion_ids"].numel()


class MicroBatches:
    """Hands ``CurvatureGRPOTrainer`` the micro-batches of each optimizer step, planned at the first of them.

    An optimizer step that takes its micro-batches from several generations is planned generation by generation.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._planned: list[dict[str, Any]] = []
        self._expected_step = -1  # TRL's count of micro-batches at the next call
        self._done = 0  # micro-batches of this optimizer step
        self._live_sums = [0.0, 0.0]  # of this optimizer step: entropy, tokens
        self._counts: list[list[int]] = []  # of this optimizer step, one for each generation it takes from
        self.trim = trimmed_columns(trainer.accelerator.unwrap_model(trainer.model))
        self._looked_for_dropout = False
        self.skipping = False  # whether sequences may be left out of what was planned last

    def next(self) -> dict[str, Any]:
        """The micro-batch of TRL's current call, or one that says there is nothing to run."""
        trainer, args = self.trainer, self.trainer.args
        if trainer._step != self._expected_step:  # a step broke off
            self.forget()
        if not self._planned:
            start = trainer._step % args.steps_per_generation
            count = min(
                trainer.current_gradient_accumulation_steps - self._done,
                args.steps_per_generation - start,
            )
            self._planned = self._plan(trainer._buffered_inputs[start : start + max(count, 1)])
        self._expected_step = trainer._step + 1
        self._done += 1
        if trainer.accelerator.sync_gradients:  # the last of this optimizer step
            self._log_counts()
            self._done = 0
        return self._planned.pop(0)

    def forget(self) -> None:
        """What was planned for a step that broke off."""
        self._planned, self._done, self._counts, self._live_sums = [], 0, [], [0.0, 0.0]

    def _plan(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        for part in parts:
            part["token_weight"] = token_weights_now(trainer, "train", part, live_mask(part))
        runs = what_runs(trainer, parts[0])
        wanted_but_not = trainer._skip_zero_advantage and not runs.skipped
        trainer._say_once(runs.why, level="warning" if wanted_but_not else "info")
        self.skipping = runs.skipped
        if not runs.regrouped:
            self._count(parts, parts)
            return list(parts)
        if not self._looked_for_dropout and has_dropout(accelerator.unwrap_model(trainer.model)):
            trainer._say_once(
                "The model has dropout, and its masks depend on where a sequence is in its micro-batch: gradients are "
                "those of skip_zero_advantage=False on average, not each time."
            )
        self._looked_for_dropout = True
        rows, most = join(parts), len(parts[0]["prompt_ids"])
        tokens_B = live_tokens(rows)
        live_B = torch.ones_like(tokens_B, dtype=torch.bool)
        if runs.skipped:
            live_B = (rows["advantages"] != 0) & (tokens_B > 0)
        n_live = int(live_B.sum())
        needed = self._over_processes([-(-n_live // most), -(-(len(live_B) - n_live) // most)]).amax(0).tolist()
        n_batches = max(1, needed[0])
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            n_batches = len(parts)  # its engine counts every backward and expects the model's hooks in each
        rows["row"] = torch.arange(len(live_B), device=live_B.device)
        indices = even_batches(live_B, row_lengths(rows), n_batches, empty_B=tokens_B == 0)
        batches = [select(rows, index_B, self.trim, trainer.pad_to_multiple_of) for index_B in indices]

        run_B = torch.zeros_like(live_B)
        run_B[torch.cat(indices)] = True
        self._statistics = StepStatistics(trainer, tokens_B, live_B, n_parts=len(parts), skipping=runs.skipped)
        looked_at = []
        if runs.skipped and trainer._full_entropy and needed[1] > 0:
            looked_at = self._look_at_dead(rows, ~live_B, needed[1])
        self._count(parts, batches, looked_at)
        names = ("prompt_id", "prompt_key", "group_rewards", "group_position")  # a subclass's batch may not have them
        batches[-1]["skipped"] = {name: rows[name][~run_B] for name in names if name in rows}
        return [{NOTHING: True} for _ in range(len(parts) - n_batches)] + batches

    def _count(
        self, parts: list[dict[str, Any]], batches: list[dict[str, Any]], looked_at: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Of one plan, on this process: what TRL would run, what runs, and what gets a forward pass alone."""
        counts = [len(batches)]
        for count in (sequences, tokens, positions):
            counts += [sum(map(count, parts)), sum(map(count, batches))]
        counts[-1] += round(sum(map(positions, looked_at)) / 3)
        self._counts.append(counts)

    def _log_counts(self) -> None:
        """Of the whole optimizer step, over all processes."""
        of_step = torch.tensor(self._counts).sum(0).tolist()
        self._counts = []
        gathered = self._over_processes(of_step)
        counts = StepCounts(of_step[0], *gathered[:, 1:].sum(0).tolist())  # every process has as many micro-batches
        for name, value in compute_metrics(counts).items():
            self.trainer._metrics["train"][name].append(value)

    def _over_processes(self, numbers: list[int]) -> torch.Tensor:
        """(processes, numbers) int64, on the CPU."""
        local = torch.tensor([numbers], device=self.trainer.accelerator.device)
        return self.trainer.accelerator.gather(local).cpu()

    def _look_at_dead(self, rows: dict[str, Any], dead_B: torch.Tensor, n_batches: int) -> list[dict[str, Any]]:
        """Entropies of sequences without a gradient: a forward alone, in as many batches on every process."""
        trainer, batches = self.trainer, []
        for index_B in even_batches(dead_B, row_lengths(rows), n_batches):
            batch = select(rows, index_B, self.trim, trainer.pad_to_multiple_of)
            entropies_BT = logprobs_of_rows(trainer, trainer.model, batch, entropy=True)[1]
            self._statistics.set_entropy(index_B, (entropies_BT * live_mask(batch)).sum(1))
            batches.append(batch)
        return batches

    def record(self, row_B: torch.Tensor, statistics_BS: torch.Tensor, *, last: bool) -> None:
        """Statistics of a micro-batch's loss; with the last one all is logged."""
        self._statistics.record(row_B, statistics_BS)
        if last:
            live_sums = self._statistics.log()
            self._live_sums = [a + b for a, b in zip(self._live_sums, live_sums, strict=True)]
        if last and self.trainer.accelerator.sync_gradients:
            entropy, n_tokens = self._live_sums
            self._live_sums = [0.0, 0.0]
            if self.skipping:
                self.trainer._metrics["train"]["entropy_live"].append(entropy / n_tokens if n_tokens else math.nan)
