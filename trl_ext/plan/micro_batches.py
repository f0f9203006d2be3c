"""Hands out the micro-batches of an optimizer step, which hold only sequences with a gradient.

Flow: TRL's own micro-batches -> token weights of each sequence (``objective/token_weights.py``) -> sequences with a
gradient (``rules.py``), regrouped by length into as few micro-batches as possible (``step_plan.py``), with padding
trimmed -> the loss. The loss's statistics are put back into TRL's micro-batches and logged (``step_statistics.py``).

Shapes: B sequences of this rank that are planned together; P prompts, G completions of one prompt.

TRL calls ``training_step`` once for each of its n micro-batches. Here the last m <= n calls get a micro-batch, and the
earlier ones get nothing to run. m is the same on every rank, and the last call synchronises gradients as TRL's does.
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
from trl_ext.probe_model import why_rows_mix
from trl_ext.schema import Batch, Sequences, join

from .compute_counts import StepCounts, compute_metrics, count_own, count_planned, over_ranks
from .model_limits import NEFTUNE, ModelLimits
from .rows import RowTable, read_rows
from .rules import RUN_ALL, Regrouping, decide_regrouping, sequences_to_run
from .step_plan import PlanLimits, StepPlan, plan_step
from .step_statistics import StepStatistics

KEY = "micro_batch"  # in TRL's dict
COST_OF_OWN_METHOD = (
    " So sequences without a gradient run too and prompts aren't shared: a step often takes 2 to 5 times as long. What "
    "only times or logs a step belongs in a TrainerCallback (on_step_begin, on_step_end)."
)


@dataclass(frozen=True)
class MicroBatch:
    """The position of a micro-batch in its plan. TRL's dict of the micro-batch holds it under ``KEY``.

    Attributes:
        runs: False if nothing runs at this call; the dict then holds nothing else.
        row_B: indices of these rows among the planned sequences; None for TRL's own micro-batch (also in evaluation).
        last: whether this is the last micro-batch of the plan.
        packed: number of packed positions if each prompt runs once; else 0.
        skipped: in the last micro-batch, our columns of the sequences that run in none.
        not_run: in the last micro-batch, these sequences as batches, if ``what_if_dead`` needs them.
        method: the normalisation that the kernel may compute from the group's rewards; None: it takes the batch's
            advantages.
    """

    runs: bool = True
    row_B: torch.Tensor | None = None
    last: bool = False
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


def unchanged_advantages(batch: Sequences, ours_PG: torch.Tensor | None) -> torch.Tensor:
    """Returns (B,) bool: True where the advantage is our normalisation's, not changed by a subclass or a callback."""
    prompt_B, position_B, advantage_B = batch.prompt_id, batch.group_position, batch.advantages
    if ours_PG is None or prompt_B is None or position_B is None or advantage_B.dim() != 1:
        return torch.zeros(len(batch), dtype=torch.bool, device=advantage_B.device)
    return ours_PG[prompt_B, position_B] == advantage_B


class MicroBatches:
    """Plans an optimizer step at its first call, and hands out one micro-batch per call.

    If a step's micro-batches come from several generation batches, it plans each generation batch by itself.
    """

    def __init__(self, run: RunSettings, model: torch.nn.Module, limits: ModelLimits) -> None:
        self.run, self.accelerator, self.options, self.limits = run, run.accelerator, run.options, limits
        self.mixed = why_rows_mix(self.accelerator.unwrap_model(model))
        self.skipping = False  # whether the latest plan skips sequences without a gradient
        self._planned: list[Batch] = []
        self._statistics: StepStatistics | None = None
        self._expected = -1  # TRL's count of micro-batches at the next call
        self._done = 0  # micro-batches handed out in this optimizer step
        self._live_sums = [0.0, 0.0]  # sums over this optimizer step: entropy, tokens
        self._counts: list[StepCounts] = []  # of this optimizer step, one per generation batch

    def next(self, parts: Sequence[Batch], position: StepPosition, request: StepRequest) -> Batch:
        """Returns the micro-batch of TRL's current call. ``parts`` are TRL's micro-batches of the generation batch."""
        if position.micro_batch != self._expected:  # an exception ended the previous step early
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

    def decide_regrouping(self, batch: Sequences, settings: LossSettings, override: str | None) -> Regrouping:
        """Decides whether sequences of ``batch`` (a micro-batch or a generation batch) may be regrouped and skipped."""
        return decide_regrouping(self.options, settings, batch, override or self.mixed)

    def used(self, batch: Sequences, settings: LossSettings, override: str | None, *, training: bool) -> torch.Tensor:
        """Returns (B,) bool: the sequences of a generation batch that the loss will use."""
        return sequences_to_run(batch, self.decide_regrouping(batch, settings, override) if training else RUN_ALL)

    def forget(self) -> None:
        """Discards the plan of a step that didn't finish."""
        self._planned, self._done, self._counts, self._live_sums = [], 0, [], [0.0, 0.0]

    def _plan(self, parts: list[Sequences], request: StepRequest) -> list[Batch]:
        settings = request.settings
        runs = self.decide_regrouping(parts[0], settings, request.override)
        self._log_what_runs(runs, request.override)
        self.skipping = runs.skipped
        if not runs.regrouped:
            return self._own_micro_batches(parts, request)
        self.limits.name_random_layers()
        weighted = [part.with_columns(token_weight=token_weights(part, settings, training=True)) for part in parts]
        rows = join(weighted)
        table = read_rows(rows, sequences_to_run(rows, runs), unchanged_advantages(rows, request.advantages_PG))
        plan = self.plan(table, len(parts[0]), len(parts), share=not request.by_sequence)
        batches = [self.limits.trimming.select(rows, row_B, table) for row_B in plan.batches]
        self._counts.append(count_planned(parts, batches, plan, table))
        self._statistics = StepStatistics(
            settings,
            table.loss_tokens_B.to(rows.prompt_mask.device),
            table.wanted_B,
            n_parts=len(parts),
            entropy=not runs.skipped,
        )
        left_B = plan.left_out(table)
        notes = [
            MicroBatch(row_B=row_B, packed=packed, method=request.method if table.unchanged else None)
            for row_B, packed in zip(plan.batches, plan.positions(table), strict=True)
        ]
        not_run = self._not_run(rows, table, left_B, len(parts[0])) if request.by_sequence else []
        notes[-1] = replace(notes[-1], last=True, skipped=rows.of_skipped(left_B), not_run=not_run)
        planned = [{**batch.columns, KEY: note} for batch, note in zip(batches, notes, strict=True)]
        return [{KEY: NOTHING} for _ in range(len(parts) - len(planned))] + planned

    def _own_micro_batches(self, parts: list[Sequences], request: StepRequest) -> list[Batch]:
        """Returns TRL's dicts of the micro-batches; copies with a note if the kernel may normalise the rewards."""
        self._counts.append(count_own(parts))
        method = request.method
        if method is not None:
            unchanged = torch.stack([unchanged_advantages(part, request.advantages_PG).all() for part in parts])
            method = method if bool(unchanged.all()) else None
        if method is None:
            return [part.columns for part in parts]
        return [{**part.columns, KEY: MicroBatch(method=method)} for part in parts]

    def plan(self, table: RowTable, rows: int, n_parts: int, *, share: bool) -> StepPlan:
        """Plans a training step, for which TRL has ``n_parts`` micro-batches of ``rows`` sequences each."""
        # DeepSpeed's engine counts every backward and expects the model's hooks to run in each
        least = n_parts if self.accelerator.distributed_type == DistributedType.DEEPSPEED else 1
        share = share and self.limits.not_shared is None
        limits = PlanLimits(rows, least, n_parts, share, self.options.tokens_per_micro_batch)
        return self._log_not_shared(plan_step(table, limits, self.most_over_ranks))

    def plan_scoring(self, table: RowTable, rows: int) -> StepPlan:
        """Plans forward passes without backward, of ``rows`` sequences each."""
        share = self.limits.not_shared is None
        limits = PlanLimits(rows, share=share, tokens=self.options.tokens_per_micro_batch)
        return self._log_not_shared(plan_step(table, limits, self.most_over_ranks))

    def _log_not_shared(self, plan: StepPlan) -> StepPlan:
        """Returns ``plan``; logs once why prompts of this batch can't be shared."""
        if plan.not_shared is not None:
            self.run.log_once(plan.not_shared)
        return plan

    def _not_run(self, rows: Sequences, table: RowTable, left_B: torch.Tensor, n_rows: int) -> list[Sequences]:
        """Returns batches of the skipped sequences with a token in the loss; none unless ``what_if_dead`` is on."""
        skipped_B = left_B & (table.loss_tokens_B > 0)
        if not self.options.what_if_dead or not skipped_B.any():
            return []
        plan = plan_step(replace(table, wanted_B=skipped_B), PlanLimits(n_rows))
        return [self.limits.trimming.select(rows, row_B, table) for row_B in plan.batches]

    def _log_what_runs(self, runs: Regrouping, override: str | None) -> None:
        """Logs once whether sequences are skipped and prompts are shared, and why not."""
        wanted_but_not = self.options.skip_zero_advantage and not runs.skipped
        cost = COST_OF_OWN_METHOD if override is not None and override in runs.why else ""
        self.run.log_once(runs.why + cost, level="warning" if wanted_but_not else "info")
        reason = self.limits.not_shared if runs.regrouped else "every sequence runs in TRL's own micro-batches"
        if not self.options.share_prompts or reason == NEFTUNE:  # model_limits.py logs NEFTune
            return
        # by the user's own options, or logged already with the reason why sequences aren't regrouped
        expected = not runs.regrouped or not self.options.fused_loss or self.run.torch_compile
        self.run.log_once(
            "Answers to one prompt run in one row, the prompt once (in steps that log interference, in their own)."
            if reason is None
            else f"Prompts aren't shared: {reason}.",
            level="info" if reason is None or expected else "warning",
        )

    def most_over_ranks(self, number: int) -> int:
        """Returns the largest ``number`` of all ranks."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def record(self, part: MicroBatch, statistics_BS: torch.Tensor, *, last_of_step: bool) -> None:
        """Records a micro-batch's statistics; logs TRL's metrics with the last micro-batch of the plan."""
        assert part.row_B is not None and self._statistics is not None
        self._statistics.record(part.row_B, statistics_BS)
        if not part.last:
            return
        metrics, entropy, n_tokens = self._statistics.gather(self.accelerator)
        for micro_batch_metrics in metrics:
            self.run.log(micro_batch_metrics)
        self._live_sums = [self._live_sums[0] + entropy, self._live_sums[1] + n_tokens]
        if last_of_step:
            entropy, n_tokens = self._live_sums
            self._live_sums = [0.0, 0.0]
            if self.skipping:
                self.run.log({"entropy_live": entropy / n_tokens if n_tokens else math.nan})
