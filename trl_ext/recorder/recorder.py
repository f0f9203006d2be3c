"""``InterferenceRecorder`` measures how the prompts' gradients interfere, every ``interference_every`` steps.

A logged step goes through these states::

    closed --begin--> open --rows--> recording --end of micro-batch--> open --last micro-batch--> measured --> closed

open, recording    taps record each sequence's gradient         grpo_kernels/interference/gradient_sketch.py
measured           inner products and metrics over all ranks    grpo_kernels/recorder/measure.py
closed             logged, and written to a file                grpo_kernels/recorder/files.py

An error of the recorder never ends training. An error between two collectives is kept (``FailureBoundary``), because
the other ranks continue to the end of the step. An error in collective work fails on all ranks.
In both cases all ranks switch the recorder off at the end of the step, and log one reason. What-if, the extra pass and
the files are each an ``OptionalFeature``, which is switched off alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Protocol, TypeVar

import torch
from accelerate.logging import get_logger

from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.recorder.collectives import Collectives
from grpo_kernels.recorder.failures import FailureBoundary, OptionalFeature, describe_error
from grpo_kernels.recorder.files import StepExtras, write_step
from grpo_kernels.recorder.layer_check import check_layers, log_excluded
from grpo_kernels.recorder.measure import MeasuredStep, check_shapes, measure
from grpo_kernels.recorder.run_statistics import RunState, RunStatistics
from grpo_kernels.recorder.what_if_log import WhatIfLog
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.probe_model import why_rows_mix
from trl_ext.schema import Sequences

from .extra_pass import ExtraPass
from .gradients import before_deepspeed_steps, full_gradient_of
from .layer_check import probe_layers
from .logged_step import LoggedStep, loss_scale
from .prompt_features import PromptFeatures
from .what_if import compared_with

logger = get_logger(__name__)
T = TypeVar("T")


class Observer(Protocol):
    """Gets the measured curvature; the trainer passes it to the normalisation."""

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None: ...


class State(Enum):
    """The module's docstring shows the transitions; ``OFF``: the recorder does nothing for the rest of the run."""

    OFF = "off"
    CLOSED = "closed"
    OPEN = "open"
    RECORDING = "recording"
    MEASURED = "measured"


class InterferenceRecorder:
    """Records the forward and backward passes of logged steps, measures them, and logs the metrics.

    The random projections of a step depend only on the seed and the step's number, so a resumed run draws the same.

    Args:
        run: the run's settings.
        model: the policy.
        observer: gets the measured curvature.
        used: returns the run's current normalisation.
        score: returns a batch's log-probs (B, T) with their graph.

    Raises:
        ValueError: a pattern in ``interference_layers`` matches no layer.
    """

    def __init__(
        self,
        run: RunSettings,
        model: torch.nn.Module,
        *,
        observer: Observer,
        used: Callable[[], UsedNormalization],
        score: Callable[[Sequences], torch.Tensor],
    ) -> None:
        self.run, self.accelerator, self.observer, self._used = run, run.accelerator, observer, used
        self._collectives = Collectives(
            run.accelerator.device, run.accelerator.num_processes, run.accelerator.process_index
        )
        self._state = State.CLOSED if run.options.interference_every else State.OFF
        self._step: LoggedStep | None = None
        self._failures = FailureBoundary(self._mute)
        self._model = model
        self.sketch: GradientSketch | None = None
        self._features: PromptFeatures | None = None
        self.statistics = RunStatistics()
        self._last_generation = -1  # of the last measured step
        self._what_if = WhatIfLog(
            lambda: compared_with(run, used()),
            self._collectives.attempt,
            run.log_once,
            on=run.options.what_if != [],
        )
        self._extra_pass = ExtraPass(run, score)
        self._files = OptionalFeature("Interference is logged without its files")
        self._prompt_texts: dict[int, str] = {}  # by prompt key
        self._prompt_tasks: dict[int, str] = {}  # by prompt key; empty without a column "task"
        if self._state is not State.OFF:
            self._check_model(model)

    def _check_model(self, model: torch.nn.Module) -> None:
        """Switches off for a model that can't be recorded; raises ``ValueError`` for wrong ``interference_layers``."""
        layers = self.run.options.interference_layers
        try:
            model = self.accelerator.unwrap_model(model)
            mixed, obstacle = why_rows_mix(model), None
            if mixed is not None:
                obstacle = f"{mixed}: no sequence has a gradient of its own"
            else:
                GradientSketch(model, self.run.options.interference_dim, layers)
        except ValueError as error:
            if layers is not None:
                raise ValueError(f"interference_{error}") from None
            obstacle = str(error)
        except Exception as error:
            obstacle = describe_error(error)
        if obstacle is not None:
            self.stop(obstacle)

    # ---- states

    @property
    def is_open(self) -> bool:
        """Whether the current step is logged."""
        return self._step is not None

    def stop(self, reason: str) -> None:
        """Switches the recorder off for the rest of the run. All ranks call it at the same time."""
        if self._state is State.OFF:
            return
        logger.warning(f"Interference isn't logged from here on: {reason}. Training continues.")
        self.abandon()
        for taps in (self.sketch, self._features):
            if taps is not None:
                taps.close()
        self._state, self.sketch, self._features = State.OFF, None, None

    def abandon(self) -> None:
        """Closes the open step, if any, and drops what it recorded."""
        if self._state is not State.OFF:
            self._state = State.CLOSED
        self._step = None
        self._extra_pass.forget()
        if self._features is not None:
            self._features.forget()
        if self.sketch is not None:
            self.sketch.abandon()

    # ---- failures

    def _mute(self) -> None:
        if self.sketch is not None:
            self.sketch.mute()

    def _attempt(self, work: Callable[[LoggedStep, GradientSketch], T]) -> T | None:
        """Runs collective work on the open step; returns None if it failed on any rank."""

        def on_step() -> T:
            if self._step is None or self.sketch is None:
                raise RuntimeError("no step is open")
            return work(self._step, self.sketch)

        return self._failures.attempt(self._collectives, on_step)

    # ---- in each micro-batch of a logged step

    def observe_rewards(self, rewards_PG: torch.Tensor) -> None:
        """Adds a generation batch of all ranks, before dead prompts are replaced, to the constant C."""
        if self._state is not State.OFF:
            with self._failures.guarded():
                self.statistics.observe_rewards(rewards_PG)

    def set_prompts(
        self, texts_and_tasks: Callable[[], tuple[Mapping[int, str], Mapping[int, str]]], *, first: bool
    ) -> None:
        """Stores the texts and tasks of a generation batch's prompts, by prompt key.

        ``first``: whether it is the first generation batch of its step, so that those of earlier steps are dropped.
        """
        if self._state is State.OFF:
            return
        with self._failures.guarded():
            texts, tasks = texts_and_tasks()
            self._prompt_texts = {**({} if first else self._prompt_texts), **texts}
            self._prompt_tasks = {**({} if first else self._prompt_tasks), **tasks}

    @contextmanager
    def micro_batch(
        self, position: StepPosition, model: torch.nn.Module, some_skipped: Callable[[], bool]
    ) -> Iterator[None]:
        """Opens the step if needed, records one call of ``training_step``, and measures the step after its last call.

        Args:
            position: the position of the call.
            model: the model as the engine has wrapped it.
            some_skipped: returns whether the plan skips sequences, so that features belong to the others only.
        """
        if self._state is State.CLOSED and position.optimizer_step % self.run.options.interference_every == 0:
            self._open(position, model)
        try:
            with before_deepspeed_steps(self.accelerator, self._check_early) if self.is_open else nullcontext():
                yield
        except BaseException:
            self.abandon()
            raise
        if self.is_open:
            self._end_rows()
            if position.last:
                self._finish(some_skipped=some_skipped())

    def _open(self, position: StepPosition, model: torch.nn.Module) -> None:
        """closed -> open."""
        self._state, step = State.OPEN, position.optimizer_step
        generation = position.micro_batch // position.steps_per_generation
        self._step = LoggedStep(step + 1, position.micro_batch, generation, position.iteration)
        if self._failures.reason is None:  # of an earlier step
            with self._failures.guarded():
                self._open_taps(model, step)

    def _open_taps(self, model: torch.nn.Module, step: int) -> None:
        if self.sketch is not None and not self.sketch.matches(self._model):
            self.run.log_once("Parameters were frozen, unfrozen or added: interference records the current ones.")
            self.sketch = None
        if self.sketch is None:  # not earlier: FSDP2 shards the parameters after the model is built
            model = self._model = self.accelerator.unwrap_model(model)
            options = self.run.options
            self.sketch = GradientSketch(
                model,
                options.interference_dim,
                options.interference_layers,
                by_part=options.interference_parts,
                on_error=self._layer_failed,
            )
            self._features = PromptFeatures(model, on_error=self._failures.add)
            probe_layers(self.sketch, model, self.accelerator, self.run.log_once)
        self.sketch.open(self.run.seed * 1_000_003 + step)

    def _layer_failed(self, name: str, error: Exception) -> None:
        logger.warning(f"Interference excludes layer {name!r}: {type(error).__name__}: {error}")

    def rows(
        self,
        batch: Sequences,
        skipped: Sequences | None,
        position: StepPosition,
        loss_settings: LossSettings,
        dead: Callable[[], list[Sequences]],
    ) -> None:
        """Records the next forward and backward for this micro-batch: open -> recording.

        Args:
            batch: the micro-batch.
            skipped: our columns of the sequences that the plan skips.
            position: the position of the call.
            loss_settings: the current loss settings.
            dead: returns the sequences of advantage 0 as batches, for ``what_if_dead``.
        """
        step, sketch, features = self._step, self.sketch, self._features
        if step is None or self._failures.reason is not None or sketch is None or features is None:
            return
        with self._failures.guarded():
            first = step.first_prompt(position, self.run.prompts_per_generation)
            sketch.set_rows(batch.prompt_id + first)
            features.set_rows(batch.prompt_mask, batch.prompt_id + first)
            self._state = State.RECORDING
            step.add(batch, skipped, first, loss_settings, position.loss_divisor)
            if self.run.options.what_if_dead:
                self._extra_pass.keep(dead(), loss_settings, position.loss_divisor, first)

    def head_sketch(
        self, head: torch.nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor
    ) -> HeadSketch | None:
        """Returns the fused head's argument ``head_sketch``, in place of a tap; None if this step isn't logged."""
        if self._step is None or self._failures.reason is not None or self.sketch is None:
            return None
        with self._failures.guarded():
            return self.sketch.head_sketch(head, hidden_NH, sequence_N)
        return None

    def _end_rows(self) -> None:
        """recording -> open."""
        recording, self._state = self._state is State.RECORDING, State.OPEN
        with self._failures.guarded():
            if self.sketch is not None:
                self.sketch.end_rows()
            if self._features is not None and recording:
                self._features.end_rows()

    # ---- at the end of a step

    def _finish(self, *, some_skipped: bool) -> None:
        """open -> measured -> closed; off on all ranks if one of them failed."""
        found = self._attempt(self._measure)
        if found is not None:
            self._state = State.MEASURED
            self._attempt(lambda step, sketch: self._report(step, sketch, found, some_skipped=some_skipped))
        if self._failures.reason is not None:
            self.stop(self._failures.reason)
        self.abandon()

    def _check_early(self) -> None:
        """Runs the gradient check before DeepSpeed's optimizer step."""
        self._attempt(self._check)

    def _check(self, step: LoggedStep, sketch: GradientSketch) -> None:
        step.check = check_layers(sketch, self._model, self._collectives, full_gradient_of(self.accelerator))

    def _measure(self, step: LoggedStep, sketch: GradientSketch) -> MeasuredStep | None:
        """Measures the step over all ranks; returns None if its sketches contain wrong sums."""
        assert self._features is not None
        features_PH = self._features.take()
        recorded = step.take(sketch, features_PH, self._extra_pass, self.run)
        counts = check_shapes(recorded, self._collectives)
        if step.check is None:
            self._check(step, sketch)
        assert step.check is not None
        log_excluded(step.check.wrong, self.run.log_once)
        if step.check.spoiled:  # the next step excludes the wrong parameters
            self.run.log_once(f"Interference of optimizer step {step.number} isn't logged.")
            return None
        size = self._used().baseline_size
        return measure(
            recorded,
            self._collectives,
            counts,
            size,
            self._what_if.observe,
            tasks=self._prompt_tasks,
            by_part=self.run.options.interference_parts,
        )

    def _report(self, step: LoggedStep, sketch: GradientSketch, found: MeasuredStep, *, some_skipped: bool) -> None:
        """Logs a measured step, passes curvatures to the observer, and writes the step's file."""
        metrics = found.metrics
        if some_skipped and "interference/feature_cos_abs_mean" in metrics:
            metrics["interference/feature_cos_abs_mean_live"] = metrics.pop("interference/feature_cos_abs_mean")
        assert step.check is not None
        checked = step.check.metrics(sketch, found.groups, loss_scale(self.accelerator))
        if not checked:
            self.run.log_once(f"interference/coverage isn't logged for step {step.number}: its gradient is 0.", "info")
        metrics |= checked
        metrics |= self.statistics.observe(found, fresh=self._is_fresh(step))
        # the normalizer logs curvature/sigma_mean for every batch
        self.run.log({name: value for name, value in metrics.items() if name != "curvature/sigma_mean"})

        prompt_P, curvature_P = found.curvature
        # only of the last generation batch, which is the latest that the normalisation's state observed
        per_generation = self.run.prompts_per_generation
        first = int(found.sequences.prompt_id.max()) // per_generation * per_generation
        self.observer.observe_curvature(prompt_P[prompt_P >= first] - first, curvature_P[prompt_P >= first])
        if self.accelerator.is_main_process:  # an error here stays on this rank
            self._files.run(lambda: self._write(step, found), None)

    def _is_fresh(self, step: LoggedStep) -> bool:
        """Returns whether the step's prompts are a new draw.

        Resampling leaves prompts out because of their rewards; later iterations and the other steps of a generation
        batch see the same prompts again.
        """
        new, self._last_generation = step.generation > self._last_generation, step.generation
        return new and step.iteration == 0 and not self.run.options.resample_zero_variance

    def _write(self, step: LoggedStep, found: MeasuredStep) -> None:
        sequences = found.sequences
        prompts, first = sequences.prompt_id.unique(return_inverse=True)
        keys = sequences.prompt_key.new_zeros(len(prompts)).scatter_(0, first, sequences.prompt_key).tolist()
        texts = [self._prompt_texts.get(key, "") for key in keys]
        tasks = [self._prompt_tasks.get(key, "") for key in keys] if self._prompt_tasks else None
        grams_PP = found.products.grams_PP if self.run.options.interference_parts else None
        more = StepExtras(sequences, found.products.scores, self._what_if.latest, grams_PP, tasks)
        folder = self.run.output_dir
        write_step(folder, step.number, found.step, found.metrics, keys, texts, more=more, groups=found.groups)

    # ---- checkpoints

    def state_dict(self) -> RunState:
        """Returns the statistics over steps as plain numbers, for JSON."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: RunState) -> None:
        """Restores the state from what ``state_dict`` returned."""
        self.statistics.load_state_dict(state)
