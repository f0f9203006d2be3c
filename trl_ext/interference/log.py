"""Every ``interference_every`` optimizer steps: how the prompts' gradients interfere, logged and kept in a file.

Flow: taps record each sequence's gradient (``grpo_kernels/interference/gradient_sketch.py``) -> over all processes
inner products and metrics (``measure.py``) -> phase (``training_phase.py`` there) -> TRL's log, one file
(``files.py``), and the signals of ``adaptive`` and ``curvature`` normalisation.

Nothing here changes what is trained, and a failure is said once and switches it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger

from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.inner_products import squared_norms
from grpo_kernels.interference.step_gradients import PromptGroups
from grpo_kernels.interference.training_phase import SpeedupConstant, TrainingPhase
from trl_ext.mixed_rows import mixes_rows
from trl_ext.rewards.normalizer import UsedNormalization
from trl_ext.trl_surface import LossSettings, RunSettings, StepPosition

from .beside import Beside, place_scores
from .files import score_columns, sequence_columns, write_step
from .followed import leave_out_wrong, name_wrong, rehearse
from .gradients import GradientParts, before_deepspeed_steps
from .measure import Measured, Recorded, measure, only_prompts_matter
from .prompt_features import PromptFeatures
from .sequences import join_sequences, of_sequences, pack_known, sequence_coefficients
from .together import OnAnotherProcessError, Together
from .what_if_log import WhatIfLog

logger = get_logger(__name__)


class Observer(Protocol):
    """Who uses what is measured: the normalisation, through the trainer."""

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None: ...


class InterferenceLog:
    """What happens around the forward and backward of a step that is logged.

    The projections of a step are drawn from the seed and the step's number, so that a resumed run draws the same.
    ``observer`` is told what was measured. ``used`` gives the run's normalisation as it is now. ``score``: a
    batch's log-probs (B, T) with their graph.
    """

    def __init__(
        self,
        run: RunSettings,
        model: torch.nn.Module,
        *,
        observer: Observer,
        used: Callable[[], UsedNormalization],
        score: Callable[[dict[str, Any]], torch.Tensor],
    ) -> None:
        self.run, self.accelerator, self._used = run, run.accelerator, used
        self.every, self.dim = run.options.interference_every, run.options.interference_dim
        self.layers = run.options.interference_layers
        self.observer, self._together = observer, Together(run.accelerator)
        self.sketch: GradientSketch | None = None
        self._model = model
        self.features: PromptFeatures | None = None
        self.phase, self.speedup = TrainingPhase(), SpeedupConstant()
        self.what_if = WhatIfLog(run, used, self._together.attempt)
        self.beside = Beside(run, score)
        self.prompt_texts: dict[int, str] = {}
        self.prompt_tasks: dict[int, str] = {}  # none without a column of that name
        self._off = self.every == 0
        self._is_open = False
        self._failure: str | None = None
        self._failed_before: Exception | None = None  # between two steps that are logged
        self._wrong: dict[str, float] = {}  # parameters that the open step followed wrongly
        self._squares: list[float] | None = None  # of the open step's gradient, by parameter; None: not looked at yet
        self._total_square = 0.0  # of all parameters that are trained now
        self._writes = True
        self._sequences: list[dict[str, torch.Tensor | None]] = []
        self._skipped: list[dict[str, torch.Tensor]] = []  # sequences that don't run: their gradient is 0
        self._has_rows = False  # this micro-batch has something to run
        self._opened_at = 0  # TRL's count of micro-batches when the step began
        self._opened_in = 0  # the optimizer step, counted from 1 as the log counts those that are done
        if run.torch_compile and not self._off:
            self._switch_off("torch_compile=True: a compiled model doesn't call the layers' hooks")
        if not self._off:
            self._try_out(model)

    def _try_out(self, model: torch.nn.Module) -> None:
        """Raises for wrong ``interference_layers``; any other failure switches interference off."""
        try:
            mixed = mixes_rows(self.accelerator.unwrap_model(model))
            if mixed is not None:
                self._switch_off(f"{mixed}: no sequence has a gradient of its own")
                return
            GradientSketch(self.accelerator.unwrap_model(model), self.dim, self.layers)
        except ValueError as error:
            if self.layers is not None:
                raise ValueError(f"interference_{error}") from None
            self._switch_off(str(error))
        except Exception as error:
            self._switch_off(f"{type(error).__name__}: {error}")

    def _switch_off(self, reason: str) -> None:
        logger.warning(f"Interference isn't logged from here on: {reason}. Training goes on without it.")
        self._off = True
        self.abandon()
        for taps in (self.sketch, self.features):
            if taps is not None:
                taps.close()
        self.sketch = self.features = None

    def stop(self, reason: str) -> None:
        """Interference isn't logged from here on; the same on every process."""
        if not self._off:
            self._switch_off(reason)

    @property
    def is_open(self) -> bool:
        """Whether the step that is going on is logged."""
        return self._is_open

    def abandon(self) -> None:
        """The step is over, or broke off."""
        self._is_open, self._sequences, self._skipped = False, [], []
        self.beside.forget()
        if self.features is not None:
            self.features.forget()
        if self.sketch is not None:
            self.sketch.abandon()

    def see_prompts(self, known: Callable[[], tuple[Mapping[int, str], Mapping[int, str]]], *, anew: bool) -> None:
        """``known`` gives the texts and tasks of a generation batch's prompts, by key; ``anew``: those of an earlier
        step are forgotten."""
        if self._off:
            return
        try:
            texts, tasks = known()
            self.prompt_texts = {**({} if anew else self.prompt_texts), **texts}
            self.prompt_tasks = {**({} if anew else self.prompt_tasks), **tasks}
        except Exception as error:  # of this process alone: the next step that is logged switches off on all
            self._failed_before = error

    # ---- around each micro-batch of a step that is logged

    @contextmanager
    def micro_batch(
        self, position: StepPosition, model: torch.nn.Module, some_skipped: Callable[[], bool]
    ) -> Iterator[None]:
        """Around a call of ``training_step``. ``model``: as it is wrapped now. ``some_skipped``: whether sequences may
        have been left out of the step, so that features are of those that ran."""
        self._before_micro_batch(position, model)
        try:
            with before_deepspeed_steps(self.accelerator, self._look_early) if self._is_open else nullcontext():
                yield
        except BaseException:
            self.abandon()
            raise
        self._after_micro_batch(last=position.last, some_skipped=some_skipped())

    def _before_micro_batch(self, position: StepPosition, model: torch.nn.Module) -> None:
        """Opens the taps at the first micro-batch of a step that is logged."""
        self._has_rows = False
        step = position.optimizer_step
        if self._off or self._is_open or step % self.every:
            return
        self._is_open, self._sequences, self._skipped, self._failure = True, [], [], None
        self._wrong, self._squares = {}, None
        self._opened_at, self._opened_in = position.micro_batch, step + 1
        with self._guarded():
            self._open_taps(model, step)

    def _open_taps(self, model: torch.nn.Module, step: int) -> None:
        if self._failed_before is not None:
            raise self._failed_before
        if self.sketch is not None and not self.sketch.is_of(self._model):
            self.run.say_once("Parameters were frozen, unfrozen or added: interference follows what is trained now.")
            self.sketch = None
        if self.sketch is None:  # now, as FSDP2 has taken the parameters apart since the model was made
            model = self._model = self.accelerator.unwrap_model(model)
            options: dict[str, Any] = {"by_part": self.run.options.interference_parts}
            options["on_error"] = self._layer_failed
            self.sketch = GradientSketch(model, self.dim, self.layers, strict=False, **options)
            self.features = PromptFeatures(model, on_error=self._fail)
            rehearse(self.sketch, model, self.accelerator, self.run.say_once)
        self.sketch.open(self.run.seed * 1_000_003 + step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What fails within is kept until the end of the step, when all processes switch off together."""
        try:
            yield
        except Exception as error:
            self._fail(error)

    def _first_prompt(self, position: StepPosition) -> int:
        """An optimizer step that takes several generations counts the prompts of each after those before."""
        length = position.steps_per_generation
        generation = position.micro_batch // length - self._opened_at // length
        return generation * self.run.prompts_per_generation

    def rows(
        self,
        batch: dict[str, Any],
        skipped: dict[str, torch.Tensor],
        position: StepPosition,
        loss_settings: LossSettings,
        dead: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """The forward and backward to come are of this micro-batch; ``skipped`` are of sequences that don't run,
        ``dead`` gives all of advantage 0 as batches, for ``what_if_dead``."""
        if not self._is_open or self._failure is not None or self.sketch is None or self.features is None:
            return
        with self._guarded():
            first = self._first_prompt(position)
            self.sketch.set_rows(batch["prompt_id"] + first)
            self.features.set_rows(batch["prompt_mask"], batch["prompt_id"] + first)
            self._has_rows = True
            coefficient_B = sequence_coefficients(batch, loss_settings, position.accumulation)
            self._sequences.append({**of_sequences(batch, first), "coefficient": coefficient_B})
            if skipped:
                self._skipped.append(of_sequences(skipped, first))
            if self.run.options.what_if_dead:
                self.beside.keep(batch, dead(), loss_settings, position.accumulation, first)

    def head_sketch(
        self, head: torch.nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor
    ) -> HeadSketch | None:
        """For the fused head, in place of a tap on it; None between logged steps."""
        if not self._is_open or self._failure is not None or self.sketch is None:
            return None
        with self._guarded():
            return self.sketch.head_sketch(head, hidden_NH, sequence_N)
        return None

    def _after_micro_batch(self, *, last: bool, some_skipped: bool) -> None:
        """After its backward; the last one of the step closes the taps and logs."""
        if not self._is_open:
            return
        with self._guarded():
            if self.sketch is not None:
                self.sketch.end_rows()
            if self.features is not None and self._has_rows:
                self.features.end_rows()
        if not last:
            return
        recorded, shape, sizes, largest = None, [0] * 5, [0] * 2, None  # of a process that has nothing
        with self._guarded():
            if self._failure is None:
                recorded = self._take()
                shape, sizes = recorded.shape(), recorded.sizes()
        with self._guarded():
            largest = self._all_have(shape, sizes)
        if recorded is None or self._failure is not None or largest is None:
            self._switch_off(self._failure or "it failed on another process")
            return
        try:
            self._together.attempt(lambda: self._log(recorded, largest, some_skipped=some_skipped))
        except OnAnotherProcessError as error:
            self._switch_off(str(error))
        except Exception as error:
            self._switch_off(f"{type(error).__name__}: {error}")
        self.abandon()

    def _fail(self, error: Exception) -> None:
        """This process can't go on; at the end of the step all switch off together, or the others would wait."""
        self._failure = f"{type(error).__name__}: {error}"
        if self.sketch is not None:
            self.sketch.abandon()

    def _layer_failed(self, name: str, error: Exception) -> None:
        logger.warning(f"Interference goes on without layer {name!r}: {type(error).__name__}: {error}")

    # ---- at the end of a step

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler.get_scale() if scaler is not None else 1.0

    def _look_early(self) -> None:
        """Before the optimizer's step, which goes on whatever happens here: on every process, or on none."""

        def look() -> None:
            if self._failure is not None:
                raise RuntimeError(self._failure)
            self._together.agree()
            self._look()

        try:
            self._together.attempt(look)
        except Exception as error:
            self._failure = self._failure or f"{type(error).__name__}: {error}"

    def _look(self) -> None:
        """What is to be compared with the gradient, while it is there; a collective call."""
        assert self.sketch is not None
        gradients = GradientParts(self.sketch.trainable_parameters, self._together)
        self._wrong = leave_out_wrong(self.sketch, gradients, self._together)
        self._squares = gradients.squared_norms()
        if not self.sketch.is_of(self._model):  # changed within the step
            now = [one for one in self._model.parameters() if one.requires_grad]
            self._total_square = sum(GradientParts(now, self._together).squared_norms())
        else:
            self._total_square = sum(self._squares)

    def _take(self) -> Recorded:
        """What this process has of the step."""
        assert self.sketch is not None and self.features is not None
        scored = self.beside.sketched(self.sketch, self._loss_scale())
        recorded = self.sketch.take()
        processes = self.accelerator.num_processes
        run: list[Any] = self._sequences
        n_run, n_skipped = (sum(len(one["prompt_id"]) for one in of) for of in (run, self._skipped))
        sketch_B, beside_B = recorded.sketch[:n_run], recorded.sketch[n_run:]
        if n_skipped:
            sketch_B = torch.cat([sketch_B, sketch_B.new_zeros(n_skipped, *sketch_B.shape[1:])])
        known = join_sequences(self._sequences, self._skipped)
        if scored is not None and known["coefficient"] is not None:
            place_scores(known, sketch_B, beside_B, scored, self.run.num_generations)
        sketch_B.div_(processes * self._loss_scale())
        known["square"] = squared_norms(sketch_B.flatten(1))
        return Recorded(
            sketch_BMN=sketch_B,
            sections=recorded.sections,
            packed_BN=pack_known(known, processes),
            features_PH=self.features.take(),
            n_functions=known["function_rewards"].shape[1],  # type: ignore[union-attr]
            summed=only_prompts_matter(known["coefficient"], processes * len(sketch_B)),
        )

    def _all_have(self, shape: list[int], sizes: list[int]) -> list[int] | None:
        """The largest of all processes' sizes; None where a process has nothing, or of another shape."""
        numbers = self.accelerator.gather(torch.tensor([[*shape, *sizes]], device=self.accelerator.device))
        shapes = numbers[:, : len(shape)]
        if not (shapes == shapes[0]).all() or shapes[0, 0] == 0:
            return None
        return numbers[:, len(shape) :].amax(0).tolist()

    def _log(self, recorded: Recorded, largest: list[int], *, some_skipped: bool) -> None:
        """A collective call: what fails here on one process is dropped on all."""
        if self._squares is None:
            self._look()
        name_wrong(self._wrong, self.run.say_once)
        if any(error != math.inf for error in self._wrong.values()):  # what was recorded holds them: the next won't
            self.run.say_once(f"Interference of optimizer step {self._opened_in} isn't logged.")
            return
        of_run = self.run, self._used().baseline_size, self.what_if.observe
        found = measure(recorded, largest, self._together, *of_run, tasks=self.prompt_tasks)
        self._together.agree()  # nobody is told what another process doesn't know
        metrics = found.metrics
        if some_skipped and "interference/feature_cos_abs_mean" in metrics:  # of what ran
            metrics["interference/feature_cos_abs_mean_live"] = metrics.pop("interference/feature_cos_abs_mean")
        metrics |= self._checks(found.groups)
        constant = self.speedup.observe(metrics, found.step.reward_B)
        if constant is not None:
            metrics["curvature/speedup_constant"] = constant
        phase = self.phase.observe(metrics)
        if phase is not None:
            metrics["phase"] = phase
        if found.orthogonality is not None:
            metrics["interference/orthogonality"] = found.orthogonality
        # curvature/sigma_mean is logged of every batch already
        self.run.log({name: value for name, value in metrics.items() if name != "curvature/sigma_mean"})

        prompt_P, curvature_P = found.curvature
        # of the last generation alone, which is the one that the normalisation's state has seen last
        first = int(found.known.prompt_id.max()) // self.run.prompts_per_generation * self.run.prompts_per_generation
        self.observer.observe_curvature(prompt_P[prompt_P >= first] - first, curvature_P[prompt_P >= first])
        if self.accelerator.is_main_process and self._writes:
            self._write(found)

    def _write(self, found: Measured) -> None:
        try:
            known = found.known
            prompts, first = known.prompt_id.unique(return_inverse=True)
            keys = known.prompt_key.new_zeros(len(prompts)).scatter_(0, first, known.prompt_key).tolist()
            texts = [self.prompt_texts.get(key, "") for key in keys]
            more: dict[str, Any] = {"sequences": sequence_columns(known), "what_if": self.what_if.latest}
            if self.prompt_tasks:
                more["tasks"] = [self.prompt_tasks.get(key, "") for key in keys]
            if found.scores is not found.step.gram_BB:
                more["scores"] = score_columns(found.scores, known)
            more["parts"] = {name: gram_PP.cpu().numpy() for name, gram_PP in found.grams_PP.items()}
            more["groups"] = found.groups
            write_step(self.run.output_dir, self._opened_in, found.step, found.metrics, keys, texts, **more)
        except Exception as error:  # of this process alone: the others go on as it does
            self._writes = False
            logger.warning(f"Interference is logged without its files from here on: {type(error).__name__}: {error}")

    def _checks(self, groups: PromptGroups) -> dict[str, float]:
        """The taps against the gradients that the optimizer gets: how much of it they see, and whether rightly."""
        assert self.sketch is not None
        assert self._squares is not None
        parameters, followed = self.sketch.trainable_parameters, set(map(id, self.sketch.tapped_parameters))
        pairs = zip(self._squares, parameters, strict=True)
        tapped = sum(square for square, parameter in pairs if id(parameter) in followed)
        if self._total_square == 0:
            self.run.say_once(
                f"interference/coverage isn't logged of step {self._opened_in}: its gradient is 0.", "info"
            )
            return {}
        found = {"interference/coverage": tapped / self._total_square}
        if tapped > 0:
            norm = tapped**0.5 / self._loss_scale()
            found["interference/sketch_check"] = max(groups.gram_PP.sum().item(), 0.0) ** 0.5 / norm
        return found

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"phase": self.phase.state_dict(), "speedup": self.speedup.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        self.phase.load_state_dict(state["phase"])
        self.speedup.load_state_dict(state["speedup"])
