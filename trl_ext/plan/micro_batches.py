"""The micro-batches of an optimizer step, holding only what has a gradient.

Flow: TRL's own micro-batches -> the weight of each sequence's tokens in them (``objective/token_weights.py``) ->
sequences with a gradient (``rules.py``), in as few evenly long micro-batches as hold them (``step_plan.py``), padding
trimmed -> the loss, whose statistics come back, to be logged of TRL's own micro-batches (``step_statistics.py``).

Shapes: B sequences of all micro-batches that are planned together, on this rank; P prompts, G completions of one.

TRL calls ``training_step`` once for each of its micro-batches. Of n calls the last m <= n get a micro-batch here, the
same m on every rank, so that the last one synchronises as TRL's does; the others get none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import DistributedType

from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.objective.interface import Method
from trl_ext.objective.token_weights import token_weights
from trl_ext.probe_model import mixes_rows
from trl_ext.schema import Batch, Sequences, join

from .compute_counts import StepCounts, compute_metrics, count_own, count_planned, over_ranks
from .model_limits import NEFTUNE, ModelLimits
from .rows import RowTable, read_rows
from .rules import EVERYTHING, WhatRuns, sequences_to_run, what_runs
from .step_plan import PlanLimits, StepPlan, plan_step
from .step_statistics import StepStatistics

KEY = "micro_batch"  # in TRL's dict
COST_OF_OWN_METHOD = (
    " So sequences without a gradient run too and prompts aren't shared: a step often takes 2 to 5 times as long. What "
    "only times or logs a step belongs in a TrainerCallback (on_step_begin, on_step_end)."
)


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch is of its optimizer step. TRL's dict of its sequences carries it under ``KEY``.

    ``runs``: False where nothing is to be run at this call, whose dict holds nothing else. ``row_B``: which of the
    planned sequences these are, None in a micro-batch of TRL's own (also in evaluation). ``last``: of those planned
    together; ``skipped`` then holds our columns of the sequences that run in none of them, and ``not_run`` these
    sequences as batches, in steps that score what doesn't run. ``packed``: where prompts run once, how many positions
    that makes; else 0. ``method``: the normalisation that the kernel may evaluate from the group's rewards, None where
    it is to take the batch's advantages.
    """

    runs: bool = True
    row_B: torch.Tensor | None = None
    last: bool = False
    packed: int = 0
    skipped: Sequences | None = None
    not_run: list[Sequences] = field(default_factory=list)
    method: Method | None = None

    @property
    def whole(self) -> bool:
        """One of TRL's own."""
        return self.row_B is None


NOTHING = MicroBatch(runs=False)


def micro_batch(batch: Mapping[str, Any]) -> MicroBatch:
    """What ``batch``, TRL's dict, is of its optimizer step."""
    return batch.get(KEY, MicroBatch())


@dataclass(frozen=True)
class StepRequest:
    """What a plan depends on beyond TRL's micro-batches.

    ``advantages_PG``: those of the latest generation, of all ranks, by which changed ones are noticed (None: not
    known). ``method``: the normalisation, where the kernel can evaluate it from a group's rewards alone and no subclass
    computes the loss; else None. ``own``: the log's words for a subclass's method of ``rules.OWN_METHODS``, or None.
    ``by_sequence``: each sequence's own gradient is wanted, so that prompts aren't shared.
    """

    settings: LossSettings
    advantages_PG: torch.Tensor | None
    method: Method | None
    own: str | None
    by_sequence: bool


def unchanged_advantages(batch: Sequences, made_PG: torch.Tensor | None) -> torch.Tensor:
    """(B,) bool: the advantage is the one that the normalisation made, not a subclass's or a callback's."""
    prompt_B, position_B, advantage_B = batch.prompt_id, batch.group_position, batch.advantages
    if made_PG is None or prompt_B is None or position_B is None or advantage_B.dim() != 1:
        return torch.zeros(len(batch), dtype=torch.bool, device=advantage_B.device)
    return made_PG[prompt_B, position_B] == advantage_B


class MicroBatches:
    """Hands out the micro-batches of each optimizer step, planned at the first of them.

    An optimizer step that takes its micro-batches from several generations is planned generation by generation.
    """

    def __init__(self, run: RunSettings, model: torch.nn.Module, limits: ModelLimits) -> None:
        self.run, self.accelerator, self.options, self.limits = run, run.accelerator, run.options, limits
        self.mixed = mixes_rows(self.accelerator.unwrap_model(model))
        self.skipping = False  # whether sequences may be left out of what was planned last
        self._planned: list[Batch] = []
        self._statistics: StepStatistics | None = None
        self._expected = -1  # TRL's count of micro-batches at the next call
        self._done = 0  # micro-batches of this optimizer step
        self._live_sums = [0.0, 0.0]  # of this optimizer step: entropy, tokens
        self._counts: list[StepCounts] = []  # of this optimizer step, one for each generation it takes from

    def next(self, parts: Sequence[Batch], position: StepPosition, request: StepRequest) -> Batch:
        """The micro-batch of TRL's current call; ``parts`` are TRL's own of the generation."""
        if position.micro_batch != self._expected:  # a step broke off
            self.forget()
        if not self._planned:
            self.limits.probe()
            start = position.micro_batch % position.steps_per_generation
            count = min(position.accumulation - self._done, position.steps_per_generation - start)
            own = [Sequences(part) for part in parts[start : start + max(count, 1)]]
            self._planned = self._plan(own, request)
        self._expected = position.micro_batch + 1
        self._done += 1
        if position.last:
            self.run.log(compute_metrics(over_ranks(self._counts, self.accelerator)))
            self._counts, self._done = [], 0
        return self._planned.pop(0)

    def what_runs(self, batch: Sequences, settings: LossSettings, own: str | None) -> WhatRuns:
        """Of ``batch``, one of TRL's micro-batches or a whole generation batch."""
        return what_runs(self.options, settings, batch, own or self.mixed)

    def used(self, batch: Sequences, settings: LossSettings, own: str | None, *, training: bool) -> torch.Tensor:
        """(B,) bool: sequences of a whole batch that the loss will be made of."""
        return sequences_to_run(batch, self.what_runs(batch, settings, own) if training else EVERYTHING)

    def forget(self) -> None:
        """What was planned for a step that broke off."""
        self._planned, self._done, self._counts, self._live_sums = [], 0, [], [0.0, 0.0]

    def _plan(self, parts: list[Sequences], request: StepRequest) -> list[Batch]:
        settings = request.settings
        parts = [part.with_columns(token_weight=token_weights(part, settings, training=True)) for part in parts]
        runs = self.what_runs(parts[0], settings, request.own)
        self._say_what_runs(runs, request.own)
        self.skipping = runs.skipped
        if not runs.regrouped:
            return self._own_micro_batches(parts, request)
        self.limits.name_random_layers()
        rows = join(parts)
        table = read_rows(rows, sequences_to_run(rows, runs), unchanged_advantages(rows, request.advantages_PG))
        plan = self.plan(table, len(parts[0]), len(parts), share=not request.by_sequence)
        batches = [self.limits.trimming.select(rows, row_B, table) for row_B in plan.batches]
        self._counts.append(count_planned(parts, batches, plan, table))
        self._statistics = StepStatistics(
            settings,
            table.live_B.to(rows.prompt_mask.device),
            table.wanted_B,
            n_parts=len(parts),
            entropy=not runs.skipped,
        )
        left_B = plan.left_out(table)
        ones = [
            MicroBatch(row_B=row_B, packed=packed, method=request.method if table.unchanged else None)
            for row_B, packed in zip(plan.batches, plan.positions(table), strict=True)
        ]
        not_run = self._not_run(rows, table, left_B, len(parts[0])) if request.by_sequence else []
        ones[-1] = replace(ones[-1], last=True, skipped=rows.of_skipped(left_B), not_run=not_run)
        planned = [{**batch.columns, KEY: one} for batch, one in zip(batches, ones, strict=True)]
        return [{KEY: NOTHING} for _ in range(len(parts) - len(planned))] + planned

    def _own_micro_batches(self, parts: list[Sequences], request: StepRequest) -> list[Batch]:
        """TRL's, as they are; with a note where the kernel may normalise the rewards."""
        self._counts.append(count_own(parts))
        method = request.method
        if method is not None:
            unchanged = torch.stack([unchanged_advantages(part, request.advantages_PG).all() for part in parts])
            method = method if bool(unchanged.all()) else None
        note = {} if method is None else {KEY: MicroBatch(method=method)}
        return [{**part.columns, **note} for part in parts]

    def plan(self, table: RowTable, rows: int, n_parts: int, *, share: bool) -> StepPlan:
        """Of an optimizer step in training, whose ``n_parts`` micro-batches TRL would give ``rows`` sequences each."""
        # DeepSpeed's engine counts every backward and expects the model's hooks in each
        least = n_parts if self.accelerator.distributed_type == DistributedType.DEEPSPEED else 1
        share = share and self.limits.not_shared is None
        limits = PlanLimits(rows, least, n_parts, share, self.options.tokens_per_micro_batch)
        return self.say_not_shared(plan_step(table, limits, self.most_over_ranks))

    def plan_scoring(self, table: RowTable, rows: int) -> StepPlan:
        """Of forward passes alone, ``rows`` sequences each."""
        share = self.limits.not_shared is None
        limits = PlanLimits(rows, share=share, tokens=self.options.tokens_per_micro_batch)
        return self.say_not_shared(plan_step(table, limits, self.most_over_ranks))

    def say_not_shared(self, plan: StepPlan) -> StepPlan:
        """``plan``; where prompts of this batch can't be shared, that is said once."""
        if plan.not_shared is not None:
            self.run.say_once(plan.not_shared)
        return plan

    def _not_run(self, rows: Sequences, table: RowTable, left_B: torch.Tensor, n_rows: int) -> list[Sequences]:
        """Sequences in no micro-batch that have a token that counts, as batches, where ``what_if_dead`` asks for it."""
        silent_B = left_B & (table.live_B > 0)
        if not self.options.what_if_dead or not silent_B.any():
            return []
        plan = plan_step(replace(table, wanted_B=silent_B), PlanLimits(n_rows))
        return [self.limits.trimming.select(rows, row_B, table) for row_B in plan.batches]

    def _say_what_runs(self, runs: WhatRuns, own: str | None) -> None:
        wanted_but_not = self.options.skip_zero_advantage and not runs.skipped
        cost = COST_OF_OWN_METHOD if own is not None and own in runs.why else ""
        self.run.say_once(runs.why + cost, level="warning" if wanted_but_not else "info")
        reason = self.limits.not_shared if runs.regrouped else "every sequence runs in TRL's own micro-batches"
        if not self.options.share_prompts or reason == NEFTUNE:  # which is said where it is found
            return
        chosen = not runs.regrouped or not self.options.fused_loss or self.run.torch_compile  # the user knows
        self.run.say_once(
            "Answers to one prompt run in one row, the prompt once (in steps that log interference, in their own)."
            if reason is None
            else f"Prompts aren't shared: {reason}.",
            level="info" if reason is None or chosen else "warning",
        )

    def most_over_ranks(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def record(self, part: MicroBatch, statistics_BS: torch.Tensor, *, last_of_step: bool) -> None:
        """Statistics of a micro-batch's loss; with the last one planned together all is logged."""
        assert part.row_B is not None and self._statistics is not None
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
