"""Hands out the micro-batches of an optimizer step, which hold only sequences with a gradient.

Flow: TRL's own micro-batches -> token weights of each sequence (``objective/token_weights.py``) -> sequences with a
gradient (``rules.py``), regrouped by length into as few micro-batches as possible (``step_plan.py``), with padding
trimmed -> the loss. The loss's statistics are put back into TRL's micro-batches and logged (``step_statistics.py``).

Shapes: B sequences of this rank that are planned together; P prompts, G completions of one prompt.

TRL calls ``training_step`` once for each of its n micro-batches. Here the last m <= n calls get a micro-batch, and the
earlier ones get nothing to run. m is the same on every rank, and the last call synchronises gradients as TRL's does.
One process may have m > n, if memory decides the size: then the last call runs the rest too (``run_call.py``). If it
runs out of memory, the failing call plans the step's sequences again, at half the size, and runs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate.utils import DistributedType

from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.objective.token_weights import token_weights
from trl_ext.probe_model import has_engine, why_rows_mix
from trl_ext.schema import Batch, Sequences, join

from .compute_counts import StepCounts, compute_metrics, count_own, count_planned, over_ranks
from .micro_batch import KEY, NOTHING, MicroBatch, PlannedRows, StepRequest
from .micro_batch_size import MicroBatchSize
from .model_limits import NEFTUNE, ModelLimits
from .rows import RowTable, read_rows
from .rules import RUN_ALL, Regrouping, decide_regrouping, sequences_to_run
from .step_plan import PlanLimits, StepPlan, plan_step
from .step_state import keep_gradients, keep_random_state
from .step_statistics import StepStatistics

OUT_OF_MEMORY = (
    "Set tokens_per_micro_batch to fewer tokens, or lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps. "
)
COST_OF_OWN_METHOD = (
    " So sequences without a gradient run too and prompts aren't shared: a step often takes 2 to 5 times as long. What "
    "only times or logs a step belongs in a TrainerCallback (on_step_begin, on_step_end)."
)


def unchanged_advantages(batch: Sequences, ours_PG: torch.Tensor | None) -> torch.Tensor:
    """Returns (B,) bool: True where the advantage is our normalisation's, not changed by a subclass or a callback."""
    prompt_B, position_B, advantage_B = batch.prompt_id, batch.group_position, batch.advantages
    if ours_PG is None or prompt_B is None or position_B is None or advantage_B.dim() != 1:
        return torch.zeros(len(batch), dtype=torch.bool, device=advantage_B.device)
    return ours_PG[prompt_B, position_B] == advantage_B


class MicroBatches:
    """Plans an optimizer step at its first call, and hands out one micro-batch per call.

    If a step's micro-batches come from several generation batches, it plans each generation batch by itself.

    Attributes:
        waiting: micro-batches that the current call still has to run.
        repeated_step: TRL's number of the optimizer step that was repeated last; -1: none.
    """

    def __init__(self, run: RunSettings, model: torch.nn.Module, limits: ModelLimits, size: MicroBatchSize) -> None:
        self.run, self.accelerator, self.options, self.limits = run, run.accelerator, run.options, limits
        self.size, self._model = size, model
        self.mixed = why_rows_mix(self.accelerator.unwrap_model(model))
        self.skipping = False  # whether the latest plan skips sequences without a gradient
        self.waiting: list[tuple[Batch, Callable[[], None] | None]] = []  # with what to call before, if anything
        self.repeated_step = -1
        self.running = False  # whether a micro-batch of the current call runs
        self._planned: list[list[Batch]] = []  # by call
        self._expected = -1  # TRL's count of micro-batches at the next call
        self._optimizer_step = -1
        self._start_step()

    def _start_step(self) -> None:
        self._done, self._over = 0, False  # calls in this optimizer step; whether its last one has begun
        self._live_sums = [0.0, 0.0]  # sums over this optimizer step: entropy, tokens
        self._counts: list[StepCounts] = []  # of this optimizer step, one per generation batch
        self._plans: list[PlannedRows | None] = []  # the same; None where TRL's own micro-batches run
        self._loss: torch.Tensor | float = 0.0  # sum of the losses of the step's finished calls
        self._repeated = False  # whether the current call repeats the step
        self._restore_gradients: Callable[[], None] | None = None

    def next(self, parts: Sequence[Batch], position: StepPosition, request: StepRequest) -> Batch:
        """Returns the micro-batch of TRL's current call. ``parts`` are TRL's micro-batches of the generation batch."""
        if position.micro_batch != self._expected:  # an exception ended the previous step early
            self.forget()
        if self._over:
            self._start_step()
        if self._done == 0:
            self._optimizer_step = position.optimizer_step
            self._restore_gradients = keep_gradients(self._model) if self._one_process else None
        if not self._planned:
            self.limits.probe()
            start = position.micro_batch % position.steps_per_generation
            count = min(position.accumulation - self._done, position.steps_per_generation - start)
            own = [Sequences(part) for part in parts[start : start + max(count, 1)]]
            self._planned = self._plan(own, request)
        self._expected = position.micro_batch + 1
        self._done += 1
        self._over = position.last
        first, *others = self._planned.pop(0)
        self.waiting, self.running = [(other, None) for other in others], True
        return first

    def next_waiting(self) -> Batch:
        """Returns the next of the micro-batches that the current call still has to run."""
        batch, before = self.waiting.pop(0)
        if before is not None:
            before()
        return batch

    def end_step(self) -> None:
        """Logs what the optimizer step ran, after its last call."""
        self.run.log(compute_metrics(over_ranks(self._counts, self.accelerator)))
        entropy, n_tokens = self._live_sums
        if self.skipping:
            self.run.log({"entropy_live": entropy / n_tokens if n_tokens else math.nan})
        self._start_step()

    def decide_regrouping(self, batch: Sequences, settings: LossSettings, override: str | None) -> Regrouping:
        """Decides whether sequences of ``batch`` (a micro-batch or a generation batch) may be regrouped and skipped."""
        return decide_regrouping(self.options, settings, batch, override or self.mixed)

    def used(self, batch: Sequences, settings: LossSettings, override: str | None, *, training: bool) -> torch.Tensor:
        """Returns (B,) bool: the sequences of a generation batch that the loss will use."""
        return sequences_to_run(batch, self.decide_regrouping(batch, settings, override) if training else RUN_ALL)

    def forget(self) -> None:
        """Discards the plan of a step that didn't finish."""
        self._planned, self.waiting = [], []
        self._start_step()

    def _plan(self, parts: list[Sequences], request: StepRequest) -> list[list[Batch]]:
        """Plans the sequences of TRL's ``parts``; returns the micro-batches of each of TRL's calls."""
        settings = request.settings
        runs = self.decide_regrouping(parts[0], settings, request.override)
        self._log_what_runs(runs, request.override)
        self.skipping = runs.skipped
        if not runs.regrouped:
            self._plans.append(None)
            return [[part] for part in self._own_micro_batches(parts, request)]
        self.limits.name_random_layers()
        weighted = [part.with_columns(token_weight=token_weights(part, settings, training=True)) for part in parts]
        rows = join(weighted)
        table = read_rows(rows, sequences_to_run(rows, runs), unchanged_advantages(rows, request.advantages_PG))
        planned = PlannedRows(parts, rows, table, request, not runs.skipped, keep_random_state())
        self._plans.append(planned)
        batches, counts = self._split(planned)
        self._counts.append(counts)
        waiting = [[batch] for batch in batches]
        if len(waiting) > len(parts):  # one process alone
            return [*waiting[: len(parts) - 1], batches[len(parts) - 1 :]]
        return [[{KEY: NOTHING}] for _ in range(len(parts) - len(batches))] + waiting

    def _split(self, planned: PlannedRows) -> tuple[list[Batch], StepCounts]:
        """Splits planned sequences into micro-batches of the current size; returns them and their work."""
        parts, rows, table, request = planned.parts, planned.rows, planned.table, planned.request
        planned.plan = plan = self.plan(table, len(parts[0]), len(parts), share=not request.by_sequence)
        batches = [self.limits.trimming.select(rows, row_B, table) for row_B in plan.batches]
        if planned.statistics is None or not planned.statistics.gathered:
            planned.statistics = self._new_statistics(planned)
        left_B = plan.left_out(table)
        method = request.method if table.unchanged else None
        notes = [
            MicroBatch(row_B=row_B, packed=packed, method=method, statistics=planned.statistics)
            for row_B, packed in zip(plan.batches, plan.positions(table), strict=True)
        ]
        not_run = self._not_run(rows, table, left_B, len(parts[0])) if request.by_sequence else []
        notes[-1] = replace(notes[-1], last=True, skipped=rows.of_skipped(left_B), not_run=not_run)
        with_notes = [{**batch.columns, KEY: note} for batch, note in zip(batches, notes, strict=True)]
        return with_notes, count_planned(parts, batches, plan, table)

    def _new_statistics(self, planned: PlannedRows) -> StepStatistics:
        return StepStatistics(
            planned.request.settings,
            planned.table.loss_tokens_B.to(planned.rows.prompt_mask.device),
            planned.table.wanted_B,
            n_parts=len(planned.parts),
            entropy=planned.all_run,
        )

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
        most = math.inf if self.size.chosen and self._one_process else n_parts
        limits = self.size.limits(rows, share=share, least=least, most=most)
        return self._log_not_shared(plan_step(table, limits, self.most_over_ranks))

    def plan_scoring(self, table: RowTable, rows: int) -> StepPlan:
        """Plans forward passes without backward, of ``rows`` sequences each."""
        limits = self.size.limits(rows, share=self.limits.not_shared is None)
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
        expected = not runs.regrouped or not self.options.fused_loss
        self.run.log_once(
            "Answers to one prompt run in one row, the prompt once (in steps that log interference, in their own)."
            if reason is None
            else f"Prompts aren't shared: {reason}.",
            level="info" if reason is None or expected else "warning",
        )

    def most_over_ranks(self, number: int) -> int:
        """Returns the largest ``number`` of all ranks."""
        if self.accelerator.num_processes == 1:  # without waiting for the device
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def least_over_ranks(self, number: int) -> int:
        """Returns the smallest ``number`` of all ranks."""
        return -self.most_over_ranks(-number)

    def record(self, part: MicroBatch, statistics_BS: torch.Tensor) -> None:
        """Records a micro-batch's statistics; logs TRL's metrics with the last micro-batch of the plan."""
        assert part.row_B is not None and part.statistics is not None
        if part.statistics.gathered:  # and logged, before the step ran out of memory
            return
        part.statistics.record(part.row_B, statistics_BS)
        if not part.last:
            return
        metrics, entropy, n_tokens = part.statistics.gather(self.accelerator)
        for micro_batch_metrics in metrics:
            self.run.log(micro_batch_metrics)
        self._live_sums = [self._live_sums[0] + entropy, self._live_sums[1] + n_tokens]

    # ---- out of memory

    @property
    def _one_process(self) -> bool:
        """Whether a step can be repeated: no other rank waits in a collective, and no engine holds the gradients."""
        return self.accelerator.num_processes == 1 and not has_engine(self.accelerator)

    def start_call(self) -> None:
        """Begins a call of ``training_step``: no micro-batch of it runs yet."""
        self.running = False

    def count_loss(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Returns what the current call adds to the step's loss: the sum of ``losses``, which are 0-d.

        A call that repeated the step ran what earlier calls had run too, whose losses are subtracted.
        """
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        before = self._loss
        self._loss = total if self._repeated else before + total
        if self._repeated:
            total = total - before
        self._repeated = False
        return total

    def why_not_repeated(self) -> str | None:
        """Returns advice if the step, which is out of memory, can't be repeated; None if it can."""
        if not self._one_process:
            return OUT_OF_MEMORY + "With several processes, or an engine, a step can't be repeated."
        plans = [planned.plan for planned in self._plans if planned is not None]
        if len(plans) < len(self._plans):
            return OUT_OF_MEMORY + "TRL's own micro-batches ran, which can't be split."
        if all(len(row_B) == 1 for plan in plans for row_B in plan.batches):
            return OUT_OF_MEMORY + "Each micro-batch has one sequence already: also lower max_completion_length."
        return None

    def repeat_smaller(self) -> None:
        """Rolls the step back to its start and plans its sequences again at half the size; ``waiting`` holds them."""
        plans = [planned for planned in self._plans if planned is not None]
        for shared in {planned.plan.shared for planned in plans}:
            tables = [(planned.plan, planned.table) for planned in plans if planned.plan.shared == shared]
            tokens = max(tokens for plan, table in tables for tokens in plan.positions(table))
            rows = max(len(row_B) for plan, _ in tables for row_B in plan.batches)
            size = self.size.halve(tokens, rows, shared=shared)
            self.run.log_once(
                f"Out of memory: this step is repeated with micro-batches of at most {size}, as later ones."
            )
        assert self._restore_gradients is not None
        self._restore_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.waiting, self._counts = [], []
        for planned in plans:
            batches, counts = self._split(planned)
            self._counts.append(counts)
            self.waiting += [(batch, None if i else planned.restore_random) for i, batch in enumerate(batches)]
        self._planned = [[{KEY: NOTHING}] for _ in self._planned]
        self.repeated_step, self._repeated = self._optimizer_step, True
