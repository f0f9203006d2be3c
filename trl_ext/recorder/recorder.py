"""``InterferenceRecorder``: every ``interference_every`` optimizer steps, how the prompts' gradients interfere.

A step that is logged goes through four states::

    closed --begin--> open --rows--> recording --end of micro-batch--> open --last micro-batch--> measured --> closed

open, recording    taps record each sequence's gradient             grpo_kernels/interference/gradient_sketch.py
measured           inner products and metrics over all processes    measure.py
closed             logged, and kept in a file                       files.py

There is one failure boundary. What fails on this process between two collectives is kept (``guarded``), as the other
processes go on to the end of the step; what fails in collective work fails on all processes (``Collectives.attempt``).
Either way all processes switch the recorder off at the end of the step, for one logged reason, and training goes on.
Parts that fail alone (what-if, the extra pass, files) are each an ``OptionalPart``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from accelerate.logging import get_logger

from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.training_phase import SpeedupConstant, TrainingPhase
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.probe_model import why_rows_mix
from trl_ext.schema import Sequences

from .collectives import Collectives, OtherRankFailedError
from .extra_pass import ExtraPass
from .failures import OptionalPart, described
from .files import MoreOfStep, write_step
from .gradients import before_deepspeed_steps
from .layer_check import check_layers, name_wrong, rehearse
from .logged_step import LoggedStep, loss_scale
from .measure import MeasuredStep, check_shapes, measure
from .prompt_features import PromptFeatures
from .what_if import WhatIfLog

logger = get_logger(__name__)
T = TypeVar("T")


class Observer(Protocol):
    """Who uses what is measured: the normalisation, through the trainer."""

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None: ...


class State(Enum):
    """The module's docstring draws the transitions; ``OFF``: nothing is recorded in the rest of the run."""

    OFF = "off"
    CLOSED = "closed"
    OPEN = "open"
    RECORDING = "recording"
    MEASURED = "measured"


class InterferenceRecorder:
    """Records the forward and backward passes of the steps that are logged, measures them, and logs what it finds.

    The projections of a step are drawn from the seed and the step's number, so that a resumed run draws the same.

    Args:
        run: the run's settings.
        model: the policy.
        observer: is given the curvature that was measured.
        used: gives the run's normalisation as it is now.
        score: gives a batch's log-probs (B, T) with their graph.

    Raises:
        ValueError: ``interference_layers`` matches no layer.
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
        self._collectives = Collectives(run.accelerator)
        self._state = State.CLOSED if run.options.interference_every else State.OFF
        self._step: LoggedStep | None = None
        self._failure: str | None = None  # of this process, to be reported at the end of the next logged step
        self._model = model
        self.sketch: GradientSketch | None = None
        self._features: PromptFeatures | None = None
        self.phase, self.speedup = TrainingPhase(), SpeedupConstant()
        self._what_if = WhatIfLog(run, used, self._collectives.attempt)
        self._extra_pass = ExtraPass(run, score)
        self._files = OptionalPart("Interference is logged without its files")
        self._prompt_texts: dict[int, str] = {}
        self._prompt_tasks: dict[int, str] = {}  # empty without a column of that name
        if self._state is not State.OFF:
            self._try_out(model)

    def _try_out(self, model: torch.nn.Module) -> None:
        """Switches off for a model that can't be recorded; raises ``ValueError`` for wrong ``interference_layers``."""
        layers = self.run.options.interference_layers
        try:
            model = self.accelerator.unwrap_model(model)
            mixed, obstacle = why_rows_mix(model), None
            if self.run.torch_compile:
                obstacle = "torch_compile=True: a compiled model doesn't call the layers' hooks"
            elif mixed is not None:
                obstacle = f"{mixed}: no sequence has a gradient of its own"
            else:
                GradientSketch(model, self.run.options.interference_dim, layers)
        except ValueError as error:
            if layers is not None:
                raise ValueError(f"interference_{error}") from None
            obstacle = str(error)
        except Exception as error:
            obstacle = described(error)
        if obstacle is not None:
            self.stop(obstacle)

    # ---- states

    @property
    def is_open(self) -> bool:
        """Whether the step that is going on is logged."""
        return self._step is not None

    def stop(self, reason: str) -> None:
        """Switches the recorder off for the rest of the run; every process does, at the same time."""
        if self._state is State.OFF:
            return
        logger.warning(f"Interference isn't logged from here on: {reason}. Training goes on without it.")
        self.abandon()
        for taps in (self.sketch, self._features):
            if taps is not None:
                taps.close()
        self._state, self.sketch, self._features = State.OFF, None, None

    def abandon(self) -> None:
        """Drops the step that is open, if there is one: it is over, or broke off."""
        if self._state is not State.OFF:
            self._state = State.CLOSED
        self._step = None
        self._extra_pass.forget()
        if self._features is not None:
            self._features.forget()
        if self.sketch is not None:
            self.sketch.abandon()

    # ---- failures

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keeps what fails within until the end of the next logged step, when all processes switch off together."""
        try:
            yield
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or described(error)
        if self.sketch is not None:
            self.sketch.abandon()

    def _attempt(self, work: Callable[[LoggedStep, GradientSketch], T]) -> T | None:
        """Runs collective work on the open step, on all processes or on none; None where it failed on one."""

        def attempted() -> T:
            if self._failure is not None or self._step is None or self.sketch is None:
                raise RuntimeError(self._failure)
            return work(self._step, self.sketch)

        try:
            return self._collectives.attempt(attempted)
        except OtherRankFailedError as error:
            self._failure = self._failure or str(error)
        except Exception as error:
            self._failure = self._failure or described(error)
        return None

    # ---- around each micro-batch of a step that is logged

    def see_prompts(self, known: Callable[[], tuple[Mapping[int, str], Mapping[int, str]]], *, anew: bool) -> None:
        """``known`` gives the texts and tasks of a generation batch's prompts, by key; ``anew``: those of an earlier
        step are forgotten."""
        if self._state is State.OFF:
            return
        with self.guarded():
            texts, tasks = known()
            self._prompt_texts = {**({} if anew else self._prompt_texts), **texts}
            self._prompt_tasks = {**({} if anew else self._prompt_tasks), **tasks}

    @contextmanager
    def micro_batch(
        self, position: StepPosition, model: torch.nn.Module, some_skipped: Callable[[], bool]
    ) -> Iterator[None]:
        """Around a call of ``training_step``. ``model``: as it is wrapped now. ``some_skipped``: whether sequences may
        have been left out of the step, so that features are of those that ran."""
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
        self._step = LoggedStep(number=step + 1, first_micro_batch=position.micro_batch)
        if self._failure is None:  # of an earlier time
            with self.guarded():
                self._open_taps(model, step)

    def _open_taps(self, model: torch.nn.Module, step: int) -> None:
        if self.sketch is not None and not self.sketch.is_of(self._model):
            self.run.log_once("Parameters were frozen, unfrozen or added: interference follows what is trained now.")
            self.sketch = None
        if self.sketch is None:  # now, as FSDP2 has taken the parameters apart since the model was made
            model = self._model = self.accelerator.unwrap_model(model)
            options = self.run.options
            self.sketch = GradientSketch(
                model,
                options.interference_dim,
                options.interference_layers,
                by_part=options.interference_parts,
                strict=False,
                on_error=self._layer_failed,
            )
            self._features = PromptFeatures(model, on_error=self._fail)
            rehearse(self.sketch, model, self.accelerator, self.run.log_once)
        self.sketch.open(self.run.seed * 1_000_003 + step)

    def _layer_failed(self, name: str, error: Exception) -> None:
        logger.warning(f"Interference goes on without layer {name!r}: {type(error).__name__}: {error}")

    def rows(
        self,
        batch: Sequences,
        skipped: Sequences | None,
        position: StepPosition,
        loss_settings: LossSettings,
        dead: Callable[[], list[Sequences]],
    ) -> None:
        """The forward and backward to come are of this micro-batch: open -> recording.

        ``skipped`` are of sequences that don't run, ``dead`` gives all of advantage 0 as batches, for ``what_if_dead``.
        """
        step, sketch, features = self._step, self.sketch, self._features
        if step is None or self._failure is not None or sketch is None or features is None:
            return
        with self.guarded():
            first = step.first_prompt(position, self.run.prompts_per_generation)
            sketch.set_rows(batch.prompt_id + first)
            features.set_rows(batch.prompt_mask, batch.prompt_id + first)
            self._state = State.RECORDING
            step.add(batch, skipped, first, loss_settings, position.accumulation)
            if self.run.options.what_if_dead:
                self._extra_pass.keep(dead(), loss_settings, position.accumulation, first)

    def head_sketch(
        self, head: torch.nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor
    ) -> HeadSketch | None:
        """What the fused head takes in place of a tap on it; None between logged steps."""
        if self._step is None or self._failure is not None or self.sketch is None:
            return None
        with self.guarded():
            return self.sketch.head_sketch(head, hidden_NH, sequence_N)
        return None

    def _end_rows(self) -> None:
        """recording -> open."""
        recording, self._state = self._state is State.RECORDING, State.OPEN
        with self.guarded():
            if self.sketch is not None:
                self.sketch.end_rows()
            if self._features is not None and recording:
                self._features.end_rows()

    # ---- at the end of a step

    def _finish(self, *, some_skipped: bool) -> None:
        """open -> measured -> closed; off, on all processes, where one of them failed."""
        found = self._attempt(self._measure)
        if found is not None:
            self._state = State.MEASURED
            self._attempt(lambda step, sketch: self._report(step, sketch, found, some_skipped=some_skipped))
        if self._failure is not None:
            self.stop(self._failure)
        self.abandon()

    def _check_early(self) -> None:
        """Before DeepSpeed's optimizer step, which goes on whatever happens here."""
        self._attempt(self._check)

    def _check(self, step: LoggedStep, sketch: GradientSketch) -> None:
        step.check = check_layers(sketch, self._model, self._collectives)

    def _measure(self, step: LoggedStep, sketch: GradientSketch) -> MeasuredStep | None:
        """Measures the step over all processes; None where its sketches were wrong."""
        assert self._features is not None
        features_PH = self._features.take()
        recorded = step.take(sketch, features_PH, self._extra_pass, self.run)
        check_shapes(recorded, self._collectives)
        if step.check is None:
            self._check(step, sketch)
        assert step.check is not None
        name_wrong(step.check.wrong, self.run.log_once)
        if step.check.spoiled:  # the next step's sketches are without them
            self.run.log_once(f"Interference of optimizer step {step.number} isn't logged.")
            return None
        of_run = self.run, self._used().baseline_size, self._what_if.observe
        return measure(recorded, self._collectives, *of_run, tasks=self._prompt_tasks)

    def _report(self, step: LoggedStep, sketch: GradientSketch, found: MeasuredStep, *, some_skipped: bool) -> None:
        """Logs a measured step, gives its signals to the observer, and writes its file."""
        metrics = found.metrics
        if some_skipped and "interference/feature_cos_abs_mean" in metrics:  # of what ran
            metrics["interference/feature_cos_abs_mean_live"] = metrics.pop("interference/feature_cos_abs_mean")
        assert step.check is not None
        checked = step.check.metrics(sketch, found.groups, loss_scale(self.accelerator))
        if not checked:
            self.run.log_once(f"interference/coverage isn't logged of step {step.number}: its gradient is 0.", "info")
        metrics |= checked
        constant, phase = self.speedup.observe(metrics, found.step.reward_B), self.phase.observe(metrics)
        signals = {
            "curvature/speedup_constant": constant,
            "phase": phase,
            "interference/orthogonality": found.orthogonality,
        }
        metrics |= {name: value for name, value in signals.items() if value is not None}
        # curvature/sigma_mean is logged of every batch already
        self.run.log({name: value for name, value in metrics.items() if name != "curvature/sigma_mean"})

        prompt_P, curvature_P = found.curvature
        # of the last generation alone, which is the one that the normalisation's state has seen last
        per_generation = self.run.prompts_per_generation
        first = int(found.sequences.prompt_id.max()) // per_generation * per_generation
        self.observer.observe_curvature(prompt_P[prompt_P >= first] - first, curvature_P[prompt_P >= first])
        if self.accelerator.is_main_process:  # what fails here fails on this process alone
            self._files.run(lambda: self._write(step, found), None)

    def _write(self, step: LoggedStep, found: MeasuredStep) -> None:
        sequences = found.sequences
        prompts, first = sequences.prompt_id.unique(return_inverse=True)
        keys = sequences.prompt_key.new_zeros(len(prompts)).scatter_(0, first, sequences.prompt_key).tolist()
        texts = [self._prompt_texts.get(key, "") for key in keys]
        tasks = [self._prompt_tasks.get(key, "") for key in keys] if self._prompt_tasks else None
        grams_PP = found.products.grams_PP if self.run.options.interference_parts else None
        more = MoreOfStep(sequences, found.products.scores, self._what_if.latest, grams_PP, tasks)
        folder = self.run.output_dir
        write_step(folder, step.number, found.step, found.metrics, keys, texts, more=more, groups=found.groups)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"phase": self.phase.state_dict(), "speedup": self.speedup.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        self.phase.load_state_dict(state["phase"])
        self.speedup.load_state_dict(state["speedup"])
