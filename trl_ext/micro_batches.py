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

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType

from .batch_rows import even_batches, join, row_lengths, select
from .deferred_logprobs import logprobs_of_rows
from .fused_loss import live_mask, token_weights_now
from .skipping import has_dropout, trimmed_columns, what_runs
from .step_statistics import StepStatistics
from .token_weights import live_tokens

NOTHING = "nothing_to_run"  # the key of a micro-batch that isn't run


@dataclass(frozen=True)
class StepCounts:
    """Of the micro-batches that were planned together, over all processes: what TRL would run, and what runs here."""

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
    position, padding or not; attention, which grows with the length, saves a little more than this.
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
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.trim = trimmed_columns(model)
        self._dropout = has_dropout(model)

    def next(self) -> dict[str, Any]:
        """The micro-batch of TRL's current call, or one that says there is nothing to run."""
        trainer, args = self.trainer, self.trainer.args
        if trainer._step != self._expected_step:  # the first call, or a step broke off
            self._planned, self._done = [], 0
        if not self._planned:
            start = trainer._step % args.steps_per_generation
            count = min(
                trainer.current_gradient_accumulation_steps - self._done,
                args.steps_per_generation - start,
            )
            self._planned = self._plan(trainer._buffered_inputs[start : start + max(count, 1)])
        self._expected_step = trainer._step + 1
        self._done = 0 if trainer.accelerator.sync_gradients else self._done + 1
        return self._planned.pop(0)

    def _plan(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        for part in parts:
            part["token_weight"] = token_weights_now(trainer, "train", part, live_mask(part))
        runs = what_runs(trainer, parts[0])
        wanted_but_not = trainer._skip_zero_advantage and not runs.skipped
        trainer._say_once(runs.why, level="warning" if wanted_but_not else "info")
        if not runs.regrouped:
            self._log_counts(parts, parts)
            return list(parts)
        if self._dropout:
            trainer._say_once(
                "The model has dropout, and its masks depend on where a sequence is in its micro-batch: gradients are "
                "those of skip_zero_advantage=False on average, not each time."
            )
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
        indices = even_batches(live_B, row_lengths(rows), n_batches)
        batches = [select(rows, index_B, self.trim, trainer.pad_to_multiple_of) for index_B in indices]

        run_B = torch.zeros_like(live_B)
        run_B[torch.cat(indices)] = True
        self._statistics = StepStatistics(trainer, tokens_B, live_B, n_parts=len(parts), skipping=runs.skipped)
        if runs.skipped and trainer._full_entropy and needed[1] > 0:
            self._look_at_dead(rows, ~live_B, needed[1])
        self._log_counts(parts, batches)
        names = ("prompt_id", "prompt_key", "group_rewards", "group_position")
        batches[-1]["skipped"] = {name: rows[name][~run_B] for name in names}
        return [{NOTHING: True} for _ in range(len(parts) - n_batches)] + batches

    def _log_counts(self, parts: list[dict[str, Any]], batches: list[dict[str, Any]]) -> None:
        """What TRL would run and what runs, over all processes."""
        local = []
        for count in (sequences, tokens, positions):
            local += [sum(map(count, parts)), sum(map(count, batches))]
        counts = StepCounts(len(batches), *self._over_processes(local).sum(0).tolist())
        for name, value in compute_metrics(counts).items():
            self.trainer._metrics["train"][name].append(value)

    def _over_processes(self, numbers: list[int]) -> torch.Tensor:
        """(processes, numbers) int64, on the CPU."""
        local = torch.tensor([numbers], device=self.trainer.accelerator.device)
        return self.trainer.accelerator.gather(local).cpu()

    def _look_at_dead(self, rows: dict[str, Any], dead_B: torch.Tensor, n_batches: int) -> None:
        """Entropies of sequences without a gradient: a forward alone, in as many batches on every process."""
        trainer = self.trainer
        for index_B in even_batches(dead_B, row_lengths(rows), n_batches):
            batch = select(rows, index_B, self.trim, trainer.pad_to_multiple_of)
            entropies_BT = logprobs_of_rows(trainer, trainer.model, batch, entropy=True)[1]
            self._statistics.set_entropy(index_B, (entropies_BT * live_mask(batch)).sum(1))

    def record(self, row_B: torch.Tensor, statistics_BS: torch.Tensor, *, last: bool) -> None:
        """Statistics of a micro-batch's loss; with the last one all is logged."""
        self._statistics.record(row_B, statistics_BS)
        if last:
            self._statistics.log()
