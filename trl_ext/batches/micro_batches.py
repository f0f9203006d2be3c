"""The micro-batches of an optimizer step, holding only what has a gradient.

Flow: TRL's own micro-batches -> the weight of each sequence's tokens in them (``loss/token_weights.py``) -> sequences
with a gradient (``skipping.py``), in as few evenly long micro-batches as hold them, padding trimmed (``batch_rows.py``)
-> the loss (``loss/fused_loss.py``), whose statistics come back, to be logged of TRL's own micro-batches
(``step_statistics.py``).

Shapes: B sequences of all micro-batches that are planned together, on this process.

TRL calls ``training_step`` once for each of its micro-batches. Of n calls the last m <= n get a micro-batch here, the
same m on every process, so that the last one synchronises as TRL's does; the others get none. A process with fewer live
sequences than m runs its shortest dead ones in their place: their gradient is 0, and DDP and FSDP2 meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType

from trl_ext.asked_model import is_sharded
from trl_ext.loss.shared_prompts import let_share
from trl_ext.loss.token_weights import token_weights
from trl_ext.mixed_rows import mixes_rows
from trl_ext.trl_surface import LossSettings, RunSettings, StepPosition

from .batch_rows import RowTable, even_batches, join, read_rows, select
from .columns import trimmed_columns
from .shared_batches import (
    CAN_NOT,
    as_many,
    can_share,
    largest,
    packed_positions,
    shared_batches,
    why_not_shared,
    without_adapters,
)
from .skipping import EVERYTHING, WhatRuns, live_sequences, noise_by_row_length, random_layers, what_runs
from .step_statistics import StepStatistics

KEY = "micro_batch"  # in TRL's dict
COST_OF_OWN_METHOD = (
    " So sequences without a gradient run too and prompts aren't shared: a step often takes 2 to 5 times as long. What "
    "only times or logs a step belongs in a TrainerCallback (on_step_begin, on_step_end)."
)
# a subclass's batch may not have them
OF_SKIPPED = (
    "prompt_id", "prompt_key", "group_rewards", "group_position", "function_rewards", "generated", "advantages",
    "token_weight",
)  # fmt: skip


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch is of its optimizer step. TRL's dict of its sequences carries it under ``KEY``.

    ``runs``: False where nothing is to be run at this call, whose dict holds nothing else. ``row_B``: which of the
    planned sequences these are, None in a micro-batch of TRL's own (also in evaluation). ``last``: of those planned
    together; ``skipped`` is then what is known of the sequences that run in none of them: (B', ...) entries by name,
    and ``not_run`` the same as batches, in steps that score what doesn't run.
    ``packed``: where prompts run once, how many positions that makes; else 0.
    """

    runs: bool = True
    row_B: torch.Tensor | None = None
    last: bool = False
    packed: int = 0
    skipped: dict[str, torch.Tensor] = field(default_factory=dict)
    not_run: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """One of TRL's own."""
        return self.row_B is None


WHOLE = MicroBatch()  # one of TRL's own
NOTHING = MicroBatch(runs=False)


def micro_batch(batch: Mapping[str, Any]) -> MicroBatch:
    """What ``batch``, TRL's dict, is of its optimizer step."""
    return batch.get(KEY, WHOLE)


@dataclass(frozen=True)
class StepCounts:
    """Of an optimizer step, over all processes: what TRL would run, and what runs here."""

    micro_batches: int
    sequences: int
    sequences_run: int
    positions: int  # with padding
    positions_run: int
    tokens: int  # prompts and completions, no padding
    tokens_run: int


def compute_metrics(counts: StepCounts) -> dict[str, float]:
    """What is logged under ``compute/``.

    ``sequences_skipped_frac``, ``tokens_skipped_frac``: shares that don't run (of a shared prompt's tokens, all but
    once). ``tokens_run``: prompt and completion tokens, of all processes. ``padding_removed_frac``: of the padding that
    TRL would run. ``micro_batches``: forward and backward passes of each process. ``flops_saved_frac``: of the
    backbone's matrix products, the same for every position, padding or not; attention, which grows with the
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


def tokens_of(batch: dict[str, Any]) -> torch.Tensor:
    """Of prompts and completions, padding left out, 0-d."""
    return batch["prompt_mask"].sum() + batch["completion_mask"].sum()


def positions(batch: dict[str, Any]) -> int:
    """Token positions that the backbone sees, padding included."""
    return micro_batch(batch).packed or batch["prompt_ids"].numel() + batch["completion_ids"].numel()


class MicroBatches:
    """Hands out the micro-batches of each optimizer step, planned at the first of them.

    An optimizer step that takes its micro-batches from several generations is planned generation by generation.
    ``own``: of ``skipping.OWN_METHODS``, what to say of the one that a subclass has, or None.
    ``add_patch`` takes what changes the models while the trainer uses them (``model_patches.py``).
    """

    def __init__(
        self,
        run: RunSettings,
        model: torch.nn.Module,
        ref_model: torch.nn.Module | None,
        *,
        own: str | None,
        add_patch: Callable[[Callable[[], Callable[[], None]]], None],
    ) -> None:
        self.run, self.accelerator, self.options, self.own = run, run.accelerator, run.options, own
        self._model, self._add_patch = self.accelerator.unwrap_model(model), add_patch
        self._ref_model = None if ref_model is None else self.accelerator.unwrap_model(ref_model)
        self.mixed = mixes_rows(self._model)
        self.trim: tuple[bool, bool] = (False, False)
        self.not_shared: str | None = None
        self._asked = False
        if not is_sharded(self.accelerator):
            self.ask(self._model)
        self._looked_for_random_layers = False
        self._said_whether_shared = False
        self.skipping = False  # whether sequences may be left out of what was planned last
        self._planned: list[dict[str, Any]] = []
        self._expected = -1  # TRL's count of micro-batches at the next call
        self._done = 0  # micro-batches of this optimizer step
        self._live_sums = [0.0, 0.0]  # of this optimizer step: entropy, tokens
        self._counts: list[list[int]] = []  # of this optimizer step, one for each generation it takes from

    def ask(self, model: torch.nn.Module) -> None:
        """Asks the model, once, what may be left out of its rows; a sharded one when its engine has it, on every
        process at once."""
        if self._asked:
            self._look_for_noise()
            return
        self._asked, model = True, self.accelerator.unwrap_model(model)
        trim = trimmed_columns(model, self.accelerator, self.run.say_once, prepared=True)
        reason = why_not_shared(self.run, model, trim[0], prepared=True)
        answers = self._over_processes([*trim, reason is None]).amin(0).bool().tolist()
        self.trim = (answers[0], answers[1])
        self.not_shared = reason or (None if answers[2] else "the model can't run so on another process")
        if self.not_shared is None:
            for one in (model, self._ref_model):
                if one is not None:
                    self._add_patch(partial(let_share, without_adapters(one)))

    def next(
        self, parts: Sequence[dict[str, Any]], position: StepPosition, settings: LossSettings, *, by_sequence: bool
    ) -> dict[str, Any]:
        """The micro-batch of TRL's current call; ``parts`` are TRL's own of the generation. ``by_sequence``: each
        sequence's own gradient is wanted, so that prompts aren't shared."""
        if position.micro_batch != self._expected:  # a step broke off
            self.forget()
        if not self._planned:
            self.ask(self._model)
            start = position.micro_batch % position.steps_per_generation
            count = min(position.accumulation - self._done, position.steps_per_generation - start)
            self._planned = self._plan(list(parts[start : start + max(count, 1)]), settings, by_sequence)
        self._expected = position.micro_batch + 1
        self._done += 1
        if position.last:
            self._log_counts()
            self._done = 0
        return self._planned.pop(0)

    def what_runs(self, settings: LossSettings, batch: dict[str, Any]) -> WhatRuns:
        """Of ``batch``, one of TRL's micro-batches or a whole generation batch."""
        return what_runs(self.options, settings, batch, self.own or self.mixed)

    def used(self, batch: dict[str, Any], settings: LossSettings, *, training: bool) -> torch.Tensor:
        """(B,) bool: sequences of a whole batch that the loss will be made of."""
        return live_sequences(batch, self.what_runs(settings, batch) if training else EVERYTHING)

    def forget(self) -> None:
        """What was planned for a step that broke off."""
        self._planned, self._done, self._counts, self._live_sums = [], 0, [], [0.0, 0.0]

    def _plan(self, parts: list[dict[str, Any]], settings: LossSettings, by_sequence: bool) -> list[dict[str, Any]]:
        for part in parts:
            part["token_weight"] = token_weights(part, settings, training=True)
        runs = self.what_runs(settings, parts[0])
        wanted_but_not = self.options.skip_zero_advantage and not runs.skipped
        cost = COST_OF_OWN_METHOD if self.own is not None and self.own in runs.why else ""
        self.run.say_once(runs.why + cost, level="warning" if wanted_but_not else "info")
        self.skipping = runs.skipped
        self._say_whether_shared(runs)
        if not runs.regrouped:
            n_tokens = int(torch.stack([tokens_of(part) for part in parts]).sum())
            self._count(parts, parts, (n_tokens, n_tokens))
            return parts
        self._name_random_layers()
        rows, most = join(parts), len(parts[0]["prompt_ids"])
        table = read_rows(rows, live_sequences(rows, runs))
        live_B = table.wanted_B
        n_live = int(live_B.sum())
        n_batches, least = max(1, int(self._over_processes([-(-n_live // most)]).max())), 1
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            n_batches = least = len(parts)  # its engine counts every backward and expects the model's hooks in each
        indices = even_batches(live_B, table.length_B, n_batches, empty_B=table.live_B == 0)
        shared = None if by_sequence else self.share(rows, table, indices, least=least, most=len(parts))
        if shared is not None:
            indices, n_batches = shared, len(shared)
        batches = [self._select(rows, row_B, table) for row_B in indices]

        self._statistics = StepStatistics(
            settings,
            table.live_B.to(rows["prompt_ids"].device),
            live_B,
            n_parts=len(parts),
            entropy=not runs.skipped,
        )
        left_B = torch.ones_like(live_B)
        left_B[torch.cat(indices)] = False
        skipped = {name: rows[name][left_B] for name in OF_SKIPPED if name in rows}
        not_run: list[dict[str, Any]] = []
        silent_B = left_B & (table.live_B > 0)
        if by_sequence and self.options.what_if_dead and silent_B.any():
            needed_here = -(-int(silent_B.sum()) // most)
            silent = even_batches(silent_B, table.length_B, needed_here)
            not_run = [self._select(rows, row_B, table) for row_B in silent]
        for batch, row_B in zip(batches, indices, strict=True):
            last = batch is batches[-1]
            packed = packed_positions(row_B, table) if shared else 0
            one = MicroBatch(row_B=row_B, last=last, packed=packed)
            batch[KEY] = replace(one, skipped=skipped, not_run=not_run) if last else one
        run = [
            batch[KEY].packed or int(table.length_B[row_B].sum()) for batch, row_B in zip(batches, indices, strict=True)
        ]
        self._count(parts, batches, (int(table.length_B.sum()), sum(run)))
        return [{KEY: NOTHING} for _ in range(len(parts) - n_batches)] + batches

    def _say_whether_shared(self, runs: WhatRuns) -> None:
        if not self.options.share_prompts or self._said_whether_shared:
            return
        reason = self.not_shared if runs.regrouped else "every sequence runs in TRL's own micro-batches"
        chosen = not runs.regrouped or not self.options.fused_loss or self.run.torch_compile  # the user knows
        self.run.say_once(
            "Answers to one prompt run in one row, the prompt once (in steps that log interference, in their own)."
            if reason is None
            else f"Prompts aren't shared: {reason}.",
            level="info" if reason is None or chosen else "warning",
        )

    def share(
        self,
        rows: dict[str, Any],
        table: RowTable,
        unshared: list[torch.Tensor],
        *,
        least: int = 1,
        most: float = math.inf,
    ) -> list[torch.Tensor] | None:
        """The rows of each micro-batch where prompts run once, as many on every process; ``unshared``: without. None:
        they don't, or it takes more than ``most``, for which TRL calls."""
        if self.not_shared is not None:
            return None
        batches: list[list[int]] = []
        can = can_share(rows, table)
        if can:
            budget = self.options.tokens_per_micro_batch or largest(unshared, table)
            batches = shared_batches(table, budget)
        n_batches = max(least, int(self._over_processes([len(batches) if can else CAN_NOT]).max()))
        if n_batches >= CAN_NOT:
            self.run.say_once("Prompts aren't shared in a batch whose rows have gaps, or more than token ids.")
            return None
        if n_batches > most:
            self.run.say_once(f"Prompts aren't shared where that takes more than {most} micro-batches.")
            return None
        return as_many(batches, n_batches, table)

    def _select(self, rows: dict[str, Any], row_B: torch.Tensor, table: RowTable) -> dict[str, Any]:
        return select(rows, row_B, table, self.trim, self.run.pad_to_multiple_of)

    def _look_for_noise(self) -> None:
        """Training may have switched NEFTune on since the model was asked."""
        if not noise_by_row_length(self._model):
            return
        if any(self.trim) or self.not_shared is None:
            self.run.say_once(
                "Rows keep the length that TRL gives them, and prompts aren't shared: NEFTune's noise depends on the "
                "length of a row."
            )
        self.trim, self.not_shared, self._said_whether_shared = (False, False), "NEFTune is active", True

    def _name_random_layers(self) -> None:
        if self._looked_for_random_layers:
            return
        self._looked_for_random_layers = True
        found = random_layers(self._model)
        if found is not None:
            self.run.say_once(
                f"The model draws random numbers in training ({found}), and which ones a token gets depends on where "
                "its sequence is in its micro-batch: gradients are those of skip_zero_advantage=False on average, not "
                "each time."
            )

    def _count(
        self,
        parts: list[dict[str, Any]],
        batches: list[dict[str, Any]],
        token_counts: tuple[int, int],
    ) -> None:
        """Of one plan, on this process: what TRL would run, and what runs. ``token_counts``: of both."""
        counts = [len(batches)]
        for count in (sequences, positions):
            counts += [sum(map(count, parts)), sum(map(count, batches))]
        self._counts.append([*counts, *token_counts])

    def _log_counts(self) -> None:
        """Of the whole optimizer step, over all processes."""
        of_step = torch.tensor(self._counts).sum(0).tolist()
        self._counts = []
        gathered = self._over_processes(of_step)
        of_all = gathered[:, 1:].sum(0).tolist()
        counts = StepCounts(of_step[0], *of_all)  # every process has as many micro-batches
        self.run.log(compute_metrics(counts))

    def _over_processes(self, numbers: list[int]) -> torch.Tensor:
        """(processes, numbers) int64, on the CPU."""
        return self.accelerator.gather(torch.tensor([numbers], device=self.accelerator.device)).cpu()

    def record(self, part: MicroBatch, statistics_BS: torch.Tensor, *, last_of_step: bool) -> None:
        """Statistics of a micro-batch's loss; with the last one planned together all is logged."""
        assert part.row_B is not None
        self._statistics.record(part.row_B, statistics_BS)
        if not part.last:
            return
        metrics, entropy, n_tokens = self._statistics.gather(self.accelerator)
        for of_micro_batch in metrics:
            self.run.log(of_micro_batch)
        self._live_sums = [self._live_sums[0] + entropy, self._live_sums[1] + n_tokens]
        if last_of_step:
            entropy, n_tokens = self._live_sums
            self._live_sums = [0.0, 0.0]
            if self.skipping:
                self.run.log({"entropy_live": entropy / n_tokens if n_tokens else math.nan})
