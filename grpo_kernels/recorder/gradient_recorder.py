"""``GradientRecorder`` measures how the prompts' gradients interfere, in any PyTorch training loop.

A logged step: ``step`` opens it, taps record each micro-batch's sequences after ``rows``, and at its end all ranks
check the recorded sums against ``.grad``, exchange columns of the sketches, and compute the metrics.

An error of the recorder never ends training. An error between two collectives is stored, because the other ranks
continue to the end of the step; there, all ranks switch the recorder off, and the first logs one reason.

Shapes: S sequences of a micro-batch, B of the step on this rank, P prompts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import parameter_kinds

from .collectives import Collectives, is_main_process
from .failures import FailureBoundary, LogOnce, OptionalFeature, describe_error
from .gradients import FullGradient, GradientShards
from .layer_check import LayerCheck, check_layers, log_excluded
from .measure import RecordedStep, check_shapes, measure
from .open_step import Logged, OpenStep
from .row_columns import RowColumns, Values, row_columns
from .run_statistics import RecorderState, RunStatistics
from .what_if_log import ComparedWith, WhatIfLog, compared_methods

T = TypeVar("T")


class GradientRecorder:
    """Records a small sketch of each sequence's gradient in every tenth optimizer step::

        recorder = GradientRecorder(model, every=10)
        with recorder.step():
            for batch in micro_batches:
                recorder.rows(batch["group_id"], batch["reward"], batch["advantage"])  # (S,) each
                loss(model, batch).backward()
        optimizer.step()
        print(recorder.metrics().get("interference/cos_mean"))
        recorder.save("runs/mine")  # python -m trl_ext report runs/mine

    All passes after a ``rows`` belong to its sequences, up to the end of their backward. Then comes the next ``rows``.
    ``.grad`` must be empty or 0 when a step opens, and unclipped when it closes: the recorder compares it with what it
    recorded, and leaves out and names the parameters that differ. It adds hooks only while a logged step is open, and
    changes no forward or backward value.

    DDP and FSDP2 work if ``torch.distributed`` is initialised: every rank opens the same steps, and the figures are
    those of all ranks. Gradient accumulation, activation checkpointing, LoRA and packed rows work. ``torch.compile`` of
    the model doesn't, because a compiled module calls no hooks; the self-check finds that.

    Args:
        model: any torch module, wrapped in DDP or not.
        every: optimizer steps from one logged step to the next; the first step is logged.
        dim: k; a sketch has k * k numbers per sequence. 0: exact gradients, for small models.
        layers: patterns (``fnmatch``) of layer names; None: every layer that can be recorded.
        skip: names of parameters that are used without their layer's forward. They aren't recorded, and are named.
        by_part: whether each part of the model (``model_parts.py``) gets a sketch and metrics of its own.
        baseline_size: the rewards in the mean that is subtracted for an advantage, the own one included; 0: no such
            mean. None: the largest group's.
        seed: draws the random projections, with the step's number.
        loss_scale: returns the current factor on the loss, such as a ``GradScaler``'s ``get_scale``.
        device: where this rank's collectives run; None: where the model's first parameter is.

    Raises:
        ValueError: ``every``, ``dim``, ``layers`` or ``skip`` is wrong, or no trainable layer can be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        *,
        dim: int = 64,
        layers: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        by_part: bool = False,
        baseline_size: int | None = None,
        seed: int = 0,
        loss_scale: Callable[[], float] = lambda: 1.0,
        device: torch.device | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} must be a whole number of steps, 1 or more")
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.every, self.dim, self.layers, self.skip, self.by_part = every, dim, layers, tuple(skip), by_part
        self.baseline_size, self.seed, self.loss_scale, self.device = baseline_size, seed, loss_scale, device
        self.full_gradient: FullGradient | None = None  # for an engine that keeps gradients elsewhere than in .grad
        self.number = 0  # of the next step
        self.started = time.time()  # tells the files of two runs in one folder apart
        self.statistics = RunStatistics()
        self.tasks: Mapping[int, str] = {}  # by group id, for the interference between tasks
        self.inside = False  # whether a step is open, logged or not
        self._on, self._rows_passed = True, False
        self._sketch: GradientSketch | None = None
        self._step: OpenStep | None = None
        self._failures = FailureBoundary(self._mute, lambda: self.device or next(self.model.parameters()).device)
        methods = ComparedWith(compared_methods(None, {}))
        self._what_if = WhatIfLog(lambda: methods, self._failures.together, lambda *_: None)
        self._files = OptionalFeature("Interference is logged without its files")
        self._logged: Logged | None = None
        self._log_once = LogOnce()
        self._check_model()

    # ---- one step

    @contextmanager
    def step(self, *, fresh: bool = True) -> Iterator[None]:
        """Records the passes of one optimizer step, if its number is a multiple of ``every``.

        ``fresh``: whether the step's prompts are a new draw, not those of an earlier step. Only then they count in
        figures over several steps.
        """
        self.begin(fresh=fresh)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.end()

    def begin(self, *, fresh: bool = True) -> None:
        """Begins a step, like ``step``, in a loop that can't use a context. ``end`` or ``abandon`` ends it."""
        if self.inside:
            raise ValueError("a step is open already: recorder.step() can't be nested")
        self.inside, self._logged = True, None
        if self._on and self.number % self.every == 0:
            self._open(OpenStep(fresh))

    def end(self) -> None:
        """Ends the step; measures it, if it is a logged one. Nothing happens if no step is open."""
        try:
            if self._step is not None:
                self._finish(self._step)
            self.number += self.inside
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends the step, if one is open, and drops what it recorded."""
        self.inside, self._step = False, None
        if self._sketch is not None:
            self._sketch.abandon()

    def rows(
        self,
        group_ids: Values,
        rewards: Values,
        advantages: Values,
        coefficients: Values | None = None,
        *,
        cu_seqlens: Values | None = None,
        segments: torch.Tensor | None = None,
        group_size: int | Values | None = None,
    ) -> None:
        """Assigns the following forward and backward pass to S sequences: the batch's rows, or segments of its rows.

        It does nothing in a step that isn't logged. The first step is.

        Args:
            group_ids: (S,) whole numbers, the prompt of each sequence, the same on all ranks.
            rewards: (S,), NaN where unscorable.
            advantages: (S,).
            coefficients: (S,) c_i with u_i = c_i grad log pi(o_i | q_p), where u_i is the sequence's part of this
                rank's gradient; 0 for a dead sequence. Without them, figures that need scores are absent: other
                normalisations, noise within prompts, curvature.
            cu_seqlens: (S + 1,) for one packed row: sequence s is at the positions from cu_seqlens[s] to
                cu_seqlens[s + 1].
            segments: (R, T) each position's sequence in [0, S), -1 for none. (R, T, n) lists up to n, and is refused if
                a position has several.
            group_size: the answers of a whole group, one number or (S,). A group with fewer or more in the step is
                partial: statistics of groups leave it out. None: groups are whole.

        Raises:
            ValueError: no step is open; or in the first call, an argument is wrong, or a position belongs to several
                sequences. If a later call's is, the recorder is switched off at the end of the step.
        """
        if not self.inside:
            raise ValueError("rows needs an open step: call it within recorder.step()")
        if self._step is None or self._failures.reason is not None or self._sketch is None:
            return
        # the first call names a mistake in the loop; a later error depends on the data, and mustn't end training
        with self.guarded() if self._rows_passed else nullcontext():
            columns = row_columns(group_ids, rewards, advantages, coefficients, cu_seqlens, segments, group_size)
            self._rows_passed = True
        with self.guarded():
            if self._failures.reason is None:
                self._record(self._step, self._sketch, columns)

    def _record(self, step: OpenStep, sketch: GradientSketch, columns: RowColumns) -> None:
        step.columns.append(columns)
        sketch.set_rows(columns.table.prompt_id, columns.segment_RT)

    def end_rows(self) -> None:
        """Records no pass until the next ``rows``: for passes that add nothing to ``.grad``."""
        if self._step is not None and self._sketch is not None:
            self._sketch.end_rows()

    def head_sketch(self, head: nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor) -> HeadSketch | None:
        """Returns ``head_sketch`` for ``linear_logprob`` or ``linear_grpo_loss``, which don't call ``head``.

        None if the step isn't logged, or the head isn't recorded.

        Args:
            head: the layer whose weight the loss multiplies by.
            hidden_NH: (N, H), the hidden states that it multiplies.
            sequence_N: (N,) the sequence of each, in [0, S) of the latest ``rows``.
        """
        if self._step is None or self._failures.reason is not None or self._sketch is None:
            return None
        with self.guarded():
            return self._sketch.head_sketch(head, hidden_NH, sequence_N)
        return None

    def check(self) -> None:
        """Compares the recorded sums with the gradients now; else ``end`` does. For engines that free them earlier."""
        step = self._step
        if step is not None:
            self._failures.attempt(lambda collectives: self._check(step, collectives))

    @property
    def recording(self) -> bool:
        """Whether a logged step is open; the same on all ranks."""
        return self._step is not None

    # ---- results

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the latest step, the same on every rank; empty if it wasn't logged."""
        return {} if self._logged is None else dict(self._logged.metrics)

    def inner_products(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the latest step's group ids (P,) and the inner products (P, P) of their gradients, float64.

        None if it wasn't logged.
        """
        if self._logged is None:
            return None
        return self._logged.prompt_keys(), self._logged.found.groups.gram_PP

    def save(self, folder: str | os.PathLike[str], texts: Mapping[int, str] | None = None) -> Path | None:
        """Writes the latest step's file for ``trl_ext.read_interference``, on the first rank.

        ``texts``: the prompts' texts, by group id. Returns the file's path; None if there is nothing to write.
        """
        logged = self._logged
        if logged is None or not is_main_process():
            return None
        return self._files.run(
            lambda: logged.write(folder, texts, self.tasks, by_part=self.by_part, started=self.started), None
        )

    # ---- checkpoints

    def state_dict(self) -> RecorderState:
        """Returns the step's number, the run's start and the statistics over steps as plain numbers, for JSON."""
        return {"number": self.number, "started": self.started, "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: RecorderState) -> None:
        """Restores the state from what ``state_dict`` returned. Raises ``ValueError`` if it isn't one."""
        if missing := {"number", "statistics"} - state.keys():
            raise ValueError(f"this isn't a state of GradientRecorder: it has no {min(missing)!r}")
        try:
            self.statistics.load_state_dict(state["statistics"])
            self.number, self.started = int(state["number"]), float(state.get("started", self.started))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this isn't a state of GradientRecorder: {describe_error(error)}") from None

    # ---- failures

    def stop(self, reason: str) -> None:
        """Switches the recorder off for the rest of the run. All ranks call it at the same time."""
        if self._on:
            self._log_once(f"Interference isn't logged from here on: {reason}. Training continues.")
        inside = self.inside
        self.abandon()
        self._on, self._sketch, self.inside = False, None, inside

    def guarded(self) -> AbstractContextManager[None]:
        """Keeps an error of this context until the end of the step, when all ranks switch the recorder off."""
        return self._failures.guarded()

    def _mute(self) -> None:
        if self._sketch is not None:
            self._sketch.mute()

    # ---- a logged step

    def _check_model(self) -> None:
        """Raises ``ValueError`` if the model can't be recorded."""
        self._new_sketch()  # the one in use is built later, because FSDP2 may replace the parameters

    def _new_sketch(self) -> GradientSketch:
        return GradientSketch(
            self.model, self.dim, self.layers, skip=self.skip, by_part=self.by_part, on_error=self._layer_failed
        )

    def _layer_failed(self, name: str, error: Exception) -> None:
        self._log_once(f"Interference excludes layer {name!r}: {describe_error(error)}")

    def _open(self, step: OpenStep) -> None:
        """Opens the taps, unless a gradient is left from an earlier step: the self-check would count it."""

        def opened(collectives: Collectives) -> bool:
            sketch = self._sketch
            if sketch is not None and not sketch.matches(self.model):
                self._log_once("Parameters were frozen, unfrozen or added: interference records the current ones.")
                sketch = None
            if sketch is None:
                sketch = self._sketch = self._new_sketch()
                self._sketch_built(sketch)
            shards = GradientShards(sketch.trainable_parameters, collectives)
            if self.full_gradient is None and sum(shards.squared_norms()) > 0:
                self._log_once(
                    f"Interference of optimizer step {self.number + 1} isn't logged: a parameter has a gradient "
                    "before the step. Call optimizer.zero_grad() first."
                )
                return False
            sketch.open(self.seed * 1_000_003 + self.number)
            return True

        is_open = self._failures.attempt(opened)
        if self._failures.reason is not None:
            self.stop(self._failures.reason)
        elif is_open:
            self._step = step

    def _sketch_built(self, sketch: GradientSketch) -> None:
        """Names the parameters that aren't recorded."""
        if untapped := sketch.untapped:
            self._log_once(
                f"Interference doesn't record {len(untapped)} of {len(sketch.trainable_parameters)} trainable "
                f"tensors: {parameter_kinds(untapped)}. interference/coverage is the recorded share of the gradient."
            )

    def _finish(self, step: OpenStep) -> None:
        """Measures the step, or switches the recorder off on all ranks if one of them failed."""
        self._logged = logged = self._failures.attempt(lambda collectives: self._measure(step, collectives))
        if logged is not None:
            self._failures.attempt(lambda _: self._report(logged))
        if self._failures.reason is not None:
            self.stop(self._failures.reason)

    def _report(self, logged: Logged) -> None:
        """Gets each measured step, on all ranks, for a subclass."""

    def _check(self, step: OpenStep, collectives: Collectives) -> LayerCheck:
        """Returns the comparison with the gradients, which the step keeps."""
        assert self._sketch is not None
        step.check = check_layers(self._sketch, self.model, collectives, self.full_gradient)
        return step.check

    def _measure(self, step: OpenStep, collectives: Collectives) -> Logged | None:
        """Returns the measured step; None if its sketches contain wrong sums."""
        assert self._sketch is not None
        sketch = self._sketch
        recorded = self._take(step, sketch, collectives.processes)
        counts = check_shapes(recorded, collectives)
        check = step.check or self._check(step, collectives)
        log_excluded(check.wrong, self._log_once)
        if (reason := check.why_not_logged(sketch, self.number + 1)) is not None:
            self._log_once(reason)
            return None
        if check.total == 0 and recorded.sequences.square.any():
            self._log_once(
                "Interference isn't checked against .grad, which was empty or 0 when the step closed: close it before "
                "optimizer.zero_grad()."
            )
        groups = step.number_groups(recorded, counts, collectives)
        partial = 0 if groups is None else int(groups.partial_P.sum())
        if groups is not None and step.fresh and not partial:
            self.statistics.observe_rewards(groups.reward_PG)
        answers = recorded.sequences.group_rewards.shape[1]
        size = answers if self.baseline_size is None else self.baseline_size
        self._what_if.latest = None
        what_if = self._what_if.observe if not partial else lambda *_: {}
        found = measure(
            recorded, collectives, counts, size if size > 1 else 0, what_if, tasks=self.tasks, by_part=self.by_part
        )
        metrics = found.metrics | check.metrics(sketch, found.groups, self.loss_scale())
        if partial:
            metrics["interference/partial_groups"] = float(partial)
        metrics |= self.statistics.observe(found, fresh=step.fresh and not partial)
        return Logged(self.number + 1, found, metrics, self._what_if.latest)

    def _take(self, step: OpenStep, sketch: GradientSketch, processes: int) -> RecordedStep:
        """Ends the sketch's step, and returns what this rank recorded."""
        step.check_passes(sketch, self._log_once)
        return step.take(sketch, processes, self.loss_scale())
