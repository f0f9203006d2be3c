"""``InterferenceRecorder`` is ``GradientRecorder`` at work in our trainer, every ``interference_every`` steps.

It opens a step at the first micro-batch of an optimizer step and closes it after the last. The rest of this file is
what only our trainer has: sequences that don't run, the extra pass, the prompts' features and tasks, DeepSpeed, and a
normalisation that wants the measured curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.recorder.failures import describe_error
from grpo_kernels.recorder.gradient_recorder import GradientRecorder
from grpo_kernels.recorder.measure import RecordedStep
from grpo_kernels.recorder.open_step import Logged, OpenStep
from grpo_kernels.recorder.row_columns import RowColumns
from grpo_kernels.recorder.what_if_log import WhatIfLog
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.probe_model import why_rows_mix
from trl_ext.schema import Sequences

from .batch_table import table_of_batch, table_of_skipped
from .coefficients import sequence_coefficients
from .extra_pass import ExtraPass
from .gradients import before_deepspeed_steps, full_gradient_of
from .layer_check import probe_layers
from .prompt_features import PromptFeatures
from .what_if import compared_with


class Observer(Protocol):
    """Gets the measured curvature; the trainer passes it to the normalisation."""

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None: ...


class InterferenceRecorder(GradientRecorder):
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
        self._features: PromptFeatures | None = None
        self._extra_pass = ExtraPass(run, score)
        self._prompt_texts: dict[int, str] = {}  # by prompt key
        self._last_generation = -1  # of the last measured step
        self._some_skipped: Callable[[], bool] = lambda: False
        options = run.options
        super().__init__(
            self.accelerator.unwrap_model(model),
            options.interference_every or 1,
            dim=options.interference_dim,
            layers=options.interference_layers,
            by_part=options.interference_parts,
            seed=run.seed,
            loss_scale=self._scale,
            device=run.accelerator.device,
        )
        self.started = 0.0  # until training begins: CheckpointState
        self.full_gradient = full_gradient_of(self.accelerator)
        self._what_if = WhatIfLog(
            lambda: compared_with(run, used()), self._failures.together, run.log_once, on=options.what_if != []
        )

    def _check_model(self) -> None:
        """Switches off for a model that can't be recorded; raises ``ValueError`` for wrong ``interference_layers``."""
        if not self.run.options.interference_every:
            self._on = False
            return
        try:
            if (mixed := why_rows_mix(self.model)) is not None:
                self.stop(f"{mixed}: no sequence has a gradient of its own")
            else:
                super()._check_model()
        except ValueError as error:
            if self.layers is not None:
                raise ValueError(f"interference_{error}") from None
            self.stop(str(error))
        except Exception as error:
            self.stop(describe_error(error))

    def _scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    # ---- in each generation batch

    def observe_rewards(self, rewards_PG: torch.Tensor) -> None:
        """Adds a generation batch of all ranks, before dead prompts are replaced, to the constant C."""
        if self._on:
            with self.guarded():
                self.statistics.observe_rewards(rewards_PG)

    def set_prompts(
        self, texts_and_tasks: Callable[[], tuple[Mapping[int, str], Mapping[int, str]]], *, first: bool
    ) -> None:
        """Stores the texts and tasks of a generation batch's prompts, by prompt key.

        ``first``: whether it is the first generation batch of its step, so that those of earlier steps are dropped.
        """
        if not self._on:
            return
        with self.guarded():
            texts, tasks = texts_and_tasks()
            self._prompt_texts = {**({} if first else self._prompt_texts), **texts}
            self.tasks = {**({} if first else self.tasks), **tasks}

    # ---- in each micro-batch of a logged step

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
        if not self.inside:
            self.model, self.number = self.accelerator.unwrap_model(model), position.optimizer_step
            self._first, self._some_skipped = position, some_skipped
            self.begin(fresh=self._is_fresh(position))
        try:
            with before_deepspeed_steps(self.accelerator, self.check) if self.recording else nullcontext():
                yield
        except BaseException:
            self.abandon()
            raise
        self.end_rows()
        if position.last:
            self.end()

    def _is_fresh(self, position: StepPosition) -> bool:
        """Returns whether the step's prompts are a new draw.

        Resampling leaves prompts out because of their rewards; later iterations and the other steps of a generation
        batch see the same prompts again.
        """
        new = position.micro_batch // position.steps_per_generation > self._last_generation
        return new and position.iteration == 0 and not self.run.options.resample_zero_variance

    def add(
        self,
        batch: Sequences,
        skipped: Sequences | None,
        position: StepPosition,
        settings: LossSettings,
        dead: Callable[[], list[Sequences]],
    ) -> None:
        """Records the next forward and backward for this micro-batch.

        Args:
            batch: the micro-batch.
            skipped: our columns of the sequences that the plan skips.
            position: the position of the call.
            settings: the current loss settings.
            dead: returns the sequences of advantage 0 as batches, for ``what_if_dead``.
        """
        step, sketch, features = self._step, self._sketch, self._features
        if step is None or self._failures.reason is not None or sketch is None or features is None:
            return
        with self.guarded():
            # a step may use several generation batches
            length = position.steps_per_generation
            batches_before = position.micro_batch // length - self._first.micro_batch // length
            first = batches_before * self.run.prompts_per_generation
            coefficient_B = sequence_coefficients(batch, settings, position.loss_divisor)
            self._record(step, sketch, RowColumns(table_of_batch(batch, first, coefficient_B), None, None))
            features.set_rows(batch.prompt_mask, batch.prompt_id + first)
            if skipped is not None:
                step.idle.append(table_of_skipped(skipped, first))
            if self.run.options.what_if_dead:
                self._extra_pass.keep(dead(), settings, position.loss_divisor, first)

    def end_rows(self) -> None:
        """Records no pass until the next micro-batch."""
        with self.guarded():
            super().end_rows()
            if self._features is not None:
                self._features.end_rows()

    def abandon(self) -> None:
        """Ends the step, if one is open, and drops what it recorded."""
        super().abandon()
        self._extra_pass.forget()
        if self._features is not None:
            self._features.forget()

    # ---- at the start and the end of a logged step

    def _sketch_built(self, sketch: GradientSketch) -> None:
        super()._sketch_built(sketch)
        self._features = PromptFeatures(self.model, on_error=self._failures.add)
        probe_layers(sketch, self.model, self.accelerator, self.run.log_once)

    def _take(self, step: OpenStep, sketch: GradientSketch, processes: int) -> RecordedStep:
        """Adds the scores of the extra pass, and the prompts' features, to what was recorded."""
        assert self._features is not None
        features_PH = self._features.take()
        step.extra = self._extra_pass.run_passes(sketch, self.loss_scale())
        self.baseline_size = self._used().baseline_size
        return replace(super()._take(step, sketch, processes), features_PH=features_PH)

    def _report(self, logged: Logged) -> None:
        """Logs a measured step, passes curvatures to the observer, and writes the step's file."""
        metrics, found = logged.metrics, logged.found
        if self._some_skipped() and "interference/feature_cos_abs_mean" in metrics:
            metrics["interference/feature_cos_abs_mean_live"] = metrics.pop("interference/feature_cos_abs_mean")
        if "interference/coverage" not in metrics:
            self.run.log_once(
                f"interference/coverage isn't logged for step {logged.number}: its gradient is 0.", "info"
            )
        self._last_generation = self._first.micro_batch // self._first.steps_per_generation
        # the normalizer logs curvature/sigma_mean for every batch
        self.run.log({name: value for name, value in metrics.items() if name != "curvature/sigma_mean"})

        prompt_P, curvature_P = found.curvature
        # only of the last generation batch, which is the latest that the normalisation's state observed
        per_generation = self.run.prompts_per_generation
        first = int(found.sequences.prompt_id.max()) // per_generation * per_generation
        self.observer.observe_curvature(prompt_P[prompt_P >= first] - first, curvature_P[prompt_P >= first])
        self.save(self.run.output_dir, self._prompt_texts)
