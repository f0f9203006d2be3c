"""Every ``interference_every`` optimizer steps: how the prompts' gradients interfere, logged and kept in a file.

Flow: taps record each sequence's gradient (``grpo_kernels/interference/gradient_sketch.py``) -> gathered over
processes -> inner products and rewards -> metrics, phase (``metrics.py``, ``training_phase.py`` there) -> TRL's log,
one file (``files.py``), and the signals of ``adaptive`` and ``curvature`` normalisation.

Nothing here changes what is trained, and a failure is said once and switches it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.curvature import directional_curvature
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.metrics import interference_metrics, orthogonality
from grpo_kernels.interference.model_parts import part_metrics
from grpo_kernels.interference.sketch_error import predicted_rmse
from grpo_kernels.interference.step_gradients import StepGradients, group_by_prompt
from grpo_kernels.interference.training_phase import SpeedupConstant, TrainingPhase
from trl_ext.mixed_rows import mixes_rows
from trl_ext.trl_surface import LossSettings, RunSettings, StepPosition

from .beside import Beside, place_scores
from .files import score_columns, sequence_columns, write_step
from .followed import leave_out_wrong, name_wrong, rehearse
from .gradients import WholeGradients, before_deepspeed_steps, squared_gradient_norms
from .prompt_features import PromptFeatures, mean_by_prompt
from .sequences import Known, join_sequences, of_sequences, pack_known, sequence_coefficients, unpack_known
from .what_if_log import WhatIfLog

logger = get_logger(__name__)


def live_cosines(step: StepGradients) -> np.ndarray:
    """(L, L) cosines of the gradients of the prompts that have one."""
    groups = group_by_prompt(step)
    gram_LL = groups.gram_PP[groups.live_P][:, groups.live_P]
    norm_L = gram_LL.diagonal().sqrt()
    return (gram_LL / norm_L[:, None] / norm_L).clamp(-1, 1).cpu().numpy()


class Observer(Protocol):
    """Who uses what is measured: the normalisation, through the trainer."""

    def observe_orthogonality(self, orthogonality: float) -> None: ...

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None: ...


class InterferenceLog:
    """What happens around the forward and backward of a step that is logged.

    The projections of a step are drawn from the seed and the step's number, so that a resumed run draws the same.
    ``baseline_size``: rewards in a sequence's baseline. ``observer`` is told what was measured. ``used``: the
    normalisation's name in ``METHODS``, where it is one; ``function_weights`` of the reward functions. ``score``: a
    batch's log-probs (B, T) with their graph. ``keeps_latest`` may be set: whether the latest step's cosines are
    wanted, for images.
    """

    def __init__(
        self,
        run: RunSettings,
        model: torch.nn.Module,
        baseline_size: int,
        *,
        observer: Observer,
        used: str | None,
        function_weights: Sequence[float],
        score: Callable[[dict[str, Any]], torch.Tensor],
    ) -> None:
        self.run, self.accelerator, self.baseline_size, self.keeps_latest = run, run.accelerator, baseline_size, False
        self.every, self.dim = run.options.interference_every, run.options.interference_dim
        self.layers = run.options.interference_layers
        self.observer = observer
        self.sketch: GradientSketch | None = None
        self._model = model
        self.features: PromptFeatures | None = None
        self.phase, self.speedup = TrainingPhase(), SpeedupConstant()
        self.what_if, self.beside = WhatIfLog(run, used, function_weights), Beside(run, score)
        self.prompt_texts: dict[int, str] = {}
        self.prompt_tasks: dict[int, str] = {}  # of this process's prompts; none without a column of that name
        self.latest: np.ndarray | None = None  # cosines of the live prompts of the latest logged step, (L, L)
        self._off = self.every == 0
        self._is_open = False
        self._failure: str | None = None
        self._wrong: dict[str, float] = {}  # parameters that the open step followed wrongly
        self._squares: list[float] | None = None  # of the open step's gradient, by parameter; None: not looked at yet
        self._writes = True
        self._sequences: list[dict[str, torch.Tensor | None]] = []
        self._skipped: list[dict[str, torch.Tensor]] = []  # sequences that don't run: their gradient is 0
        self._has_rows = False  # this micro-batch has something to run
        self._opened_at = 0  # TRL's count of micro-batches when the step began
        self._n_functions = 1
        self._sections: dict[str, slice] = {}
        self._opened_in = 0  # the optimizer step, counted from 1 as the log counts those that are done
        if run.torch_compile and not self._off:
            self._switch_off("torch_compile=True: a compiled model doesn't call the layers' hooks")
        mixed = mixes_rows(self.accelerator.unwrap_model(model))
        if mixed is not None and not self._off:
            self._switch_off(f"{mixed}: no sequence has a gradient of its own")
        if not self._off:  # wrong patterns are named before training
            try:
                GradientSketch(self.accelerator.unwrap_model(model), self.dim, self.layers).close()
            except ValueError as error:
                if self.layers is not None:
                    raise ValueError(f"interference_{error}") from None
                self._switch_off(str(error))

    def _switch_off(self, reason: str) -> None:
        logger.warning(f"Interference isn't logged from here on: {reason}. Training goes on without it.")
        self._off = True
        self.abandon()
        for taps in (self.sketch, self.features):
            if taps is not None:
                taps.close()
        self.sketch = self.features = None

    @property
    def is_open(self) -> bool:
        """Whether the step that is going on is logged."""
        return self._is_open

    def abandon(self) -> None:
        """The step is over, or broke off."""
        self._is_open, self._sequences, self._skipped = False, [], []
        self.beside.forget()
        if self.features is not None:
            self.features.end_rows()
        if self.sketch is not None:
            self.sketch.abandon()

    def see_prompts(self, texts: Mapping[int, str], tasks: Mapping[int, str], *, anew: bool) -> None:
        """The texts of a generation batch's prompts, by key, and the tasks of this process's; ``anew``: those of an
        earlier step are forgotten."""
        self.prompt_texts = {**({} if anew else self.prompt_texts), **texts}
        self.prompt_tasks = {**({} if anew else self.prompt_tasks), **tasks}

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
        try:
            if self.sketch is None:  # now, as FSDP2 has taken the parameters apart since the model was made
                model = self._model = self.accelerator.unwrap_model(model)
                options: dict[str, Any] = {"by_part": self.run.options.interference_parts}
                options["on_error"] = self._layer_failed
                self.sketch = GradientSketch(model, self.dim, self.layers, strict=False, **options)
                self.features = PromptFeatures(model, on_error=self._fail)
                rehearse(self.sketch, model, self.accelerator, self.run.say_once)
            self.sketch.open(self.run.seed * 1_000_003 + step)
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
        dead: list[dict[str, Any]],
    ) -> None:
        """The forward and backward to come are of this micro-batch; ``skipped`` are of sequences that don't run,
        ``dead`` all of advantage 0 as batches, where they are to be scored beside the step."""
        if not self._is_open or self._failure is not None or self.sketch is None or self.features is None:
            return
        try:
            first = self._first_prompt(position)
            self.sketch.set_rows(batch["prompt_id"] + first)
            self.features.set_rows(batch["prompt_mask"])
            self._has_rows = True
            coefficient_B = sequence_coefficients(batch, loss_settings, position.accumulation)
            self._sequences.append({**of_sequences(batch, first), "coefficient": coefficient_B})
            if skipped:
                self._skipped.append(of_sequences(skipped, first))
            self.beside.keep(batch, dead, loss_settings, position.accumulation, first)
        except Exception as error:
            self._fail(error)

    def head_sketch(
        self, head: torch.nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor
    ) -> HeadSketch | None:
        """For the fused head, in place of a tap on it; None between logged steps."""
        if not self._is_open or self._failure is not None or self.sketch is None:
            return None
        try:
            return self.sketch.head_sketch(head, hidden_NH, sequence_N)
        except Exception as error:
            self._fail(error)
            return None

    def _after_micro_batch(self, *, last: bool, some_skipped: bool) -> None:
        """After its backward; the last one of the step closes the taps and logs."""
        if not self._is_open:
            return
        if self.sketch is not None:
            self.sketch.end_rows()
        if self.features is not None and self._has_rows:
            self._sequences[-1]["feature"] = self.features.end_rows()
        if not last:
            return
        local = None
        try:
            if self._failure is None:
                local = self._take()
        except Exception as error:
            self._fail(error)
        if not self._all_have(local):
            self._switch_off(self._failure or "it failed on another process")
            return
        assert local is not None
        try:  # of what was gathered: the same on every process, so that all fail or none
            self._log(*local, some_skipped=some_skipped)
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
        try:
            fine = self.accelerator.gather(torch.tensor([self._failure is None], device=self.accelerator.device))
            if fine.all():
                self._look()
        except Exception as error:
            self._fail(error)

    def _look(self) -> None:
        """What is to be compared with the gradient, while it is there; a collective call."""
        assert self.sketch is not None
        gradients = WholeGradients(self.sketch.trainable_parameters, self.accelerator)
        self._wrong = leave_out_wrong(self.sketch, gradients, self._model, self.accelerator)
        self._squares = squared_gradient_norms(gradients.parameters, self.accelerator)

    def _take(self) -> tuple[torch.Tensor, ...]:
        """This process's (B, ...) sketch, what is known of the sequences (``pack_known``), and (B, H) features of the
        prompts or (B, 0)."""
        assert self.sketch is not None
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
        ids, numbers = pack_known(known, processes)
        self._sections = recorded.sections
        self._n_functions = known["function_rewards"].shape[1]  # type: ignore[union-attr]
        feature_BH = known["feature"]
        if feature_BH is None:
            feature_BH = torch.empty(len(ids), 0)
        return sketch_B / (processes * self._loss_scale()), ids, numbers, feature_BH

    def _all_have(self, local: tuple[torch.Tensor, ...] | None) -> bool:
        """Whether every process has a sketch, all of one shape."""
        shape = [0, 0, 0, 0]
        if local is not None:
            shape = [*local[0].flatten(1).shape, local[2].shape[1], local[3].shape[1]]
        shapes = self.accelerator.gather(torch.tensor([shape], device=self.accelerator.device))
        return bool((shapes == shapes[0]).all()) and shapes[0, 0].item() > 0

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor.contiguous().to(self.accelerator.device))

    def _log(
        self,
        sketch_B: torch.Tensor,
        ids_B4: torch.Tensor,
        numbers_BN: torch.Tensor,
        feature_BH: torch.Tensor,
        *,
        some_skipped: bool,
    ) -> None:
        assert self.sketch is not None
        if self._squares is None:
            self._look()
        wrong = self._wrong
        name_wrong(wrong, self.run.say_once)
        if any(error != math.inf for error in wrong.values()):  # what was recorded holds them: the next step won't
            self.run.say_once(f"Interference of optimizer step {self._opened_in} isn't logged.")
            return
        sketch_B, ids_B4, numbers_BN = (self._gather(tensor) for tensor in (sketch_B, ids_B4, numbers_BN))
        feature_BH = self._gather(feature_BH) if feature_BH.shape[1] else feature_BH
        known = unpack_known(ids_B4, numbers_BN, self.run.num_generations, self._n_functions)
        prompt_B, beside_B = known.prompt_id, known.beside
        flat = sketch_B.flatten(1).double()
        scores_BB = gram_BB = flat @ flat.T
        coefficient_B = known.coefficient
        if beside_B.any():
            assert coefficient_B is not None
            gram_BB = scores_BB.masked_fill(beside_B | beside_B[:, None], 0.0)
            coefficient_B = coefficient_B.masked_fill(beside_B, 0.0)
            sketch_B = sketch_B.masked_fill(beside_B.view(-1, *[1] * (sketch_B.ndim - 1)), 0.0)
        step = StepGradients(
            gram_BB=gram_BB,
            prompt_B=prompt_B,
            reward_B=known.reward,
            coefficient_B=coefficient_B,
            baseline_size=self.baseline_size,
        )
        error = predicted_rmse(sketch_B, prompt_B) if self.dim else 0.0
        features_PH = mean_by_prompt(feature_BH, prompt_B) if feature_BH.shape[1] else None
        metrics = interference_metrics(step, sketch_rmse=error, features_PH=features_PH)
        if some_skipped and "interference/feature_cos_abs_mean" in metrics:  # of what ran
            metrics["interference/feature_cos_abs_mean_live"] = metrics.pop("interference/feature_cos_abs_mean")
        metrics |= self._checks(step.gram_BB)
        grams_PP, errors = self._by_part(sketch_B, prompt_B)
        metrics |= part_metrics(grams_PP, errors)
        constant = self.speedup.observe(metrics, step.reward_B)
        if constant is not None:
            metrics["curvature/speedup_constant"] = constant
        phase = self.phase.observe(metrics)
        if phase is not None:
            metrics["phase"] = phase
        measured = orthogonality(step, error)
        if measured is not None:
            metrics["interference/orthogonality"] = measured
            self.observer.observe_orthogonality(measured)
        metrics |= self.what_if.observe(scores_BB, known)
        # curvature/sigma_mean is logged of every batch already
        self.run.log({name: value for name, value in metrics.items() if name != "curvature/sigma_mean"})

        tasks = self._all_tasks()
        prompt_P, curvature_P = directional_curvature(step)
        # of the last generation alone, which is the one that the normalisation's state has seen last
        first = int(prompt_B.max()) // self.run.prompts_per_generation * self.run.prompts_per_generation
        self.observer.observe_curvature(prompt_P[prompt_P >= first] - first, curvature_P[prompt_P >= first])
        if self.accelerator.is_main_process:
            self._keep_latest(step)
            if self._writes:
                self._write(step, metrics, known, grams_PP, scores_BB, tasks)

    def _by_part(
        self, sketch_B: torch.Tensor, prompt_B: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """(P, P) inner products of the prompts' gradients in each part of the model, and a cosine's error there; none
        where parts aren't asked for."""
        grams_PP: dict[str, torch.Tensor] = {}
        errors: dict[str, float] = {}
        if not self.run.options.interference_parts:
            return grams_PP, errors
        prompt_P, row_B = prompt_B.unique(return_inverse=True)
        for name, columns in self._sections.items():
            part_B = sketch_B[..., columns]
            flat_P = part_B.new_zeros(len(prompt_P), part_B[0].numel(), dtype=torch.float64)
            flat_P.index_add_(0, row_B, part_B.flatten(1).double())
            grams_PP[name] = flat_P @ flat_P.T
            errors[name] = predicted_rmse(part_B, prompt_B) if self.dim else 0.0
        return grams_PP, errors

    def _all_tasks(self) -> dict[int, str]:
        """By key, of the prompts of all processes; some may have none."""
        if self.accelerator.num_processes == 1:
            return self.prompt_tasks
        return {key: task for one in gather_object([self.prompt_tasks]) for key, task in one.items()}

    def _keep_latest(self, step: StepGradients) -> None:
        """For the images; of this process alone, so that nothing of it may end the others' step."""
        try:
            if self.keeps_latest:
                self.latest = live_cosines(step)
        except Exception as error:
            logger.warning(f"Images of interference aren't drawn of this step: {type(error).__name__}: {error}")

    def _write(
        self,
        step: StepGradients,
        metrics: dict[str, float],
        known: Known,
        grams_PP: dict[str, torch.Tensor],
        scores_BB: torch.Tensor,
        tasks: Mapping[int, str],
    ) -> None:
        try:
            prompts, first = known.prompt_id.unique(return_inverse=True)
            keys = known.prompt_key.new_zeros(len(prompts)).scatter_(0, first, known.prompt_key).tolist()
            texts = [self.prompt_texts.get(key, "") for key in keys]
            more: dict[str, Any] = {"sequences": sequence_columns(known), "what_if": self.what_if.latest}
            if tasks:
                more["tasks"] = [tasks.get(key, "") for key in keys]
            if scores_BB is not step.gram_BB:
                more["scores"] = score_columns(scores_BB, known)
            more["parts"] = {name: gram_PP.cpu().numpy() for name, gram_PP in grams_PP.items()}
            write_step(self.run.output_dir, self._opened_in, step, metrics, keys, texts, **more)
        except Exception as error:  # of this process alone: the others go on as it does
            self._writes = False
            logger.warning(f"Interference is logged without its files from here on: {type(error).__name__}: {error}")

    def _checks(self, gram_BB: torch.Tensor) -> dict[str, float]:
        """The taps against the gradients that the optimizer gets: how much of it they see, and whether rightly."""
        assert self.sketch is not None
        assert self._squares is not None
        parameters, followed = self.sketch.trainable_parameters, set(map(id, self.sketch.tapped_parameters))
        squares = self._squares
        everything = sum(squares)
        tapped = sum(square for square, parameter in zip(squares, parameters, strict=True) if id(parameter) in followed)
        if tapped == 0:
            return {}
        norm = tapped**0.5 / self._loss_scale()
        return {
            "interference/coverage": tapped / everything,
            "interference/sketch_check": max(gram_BB.sum().item(), 0.0) ** 0.5 / norm,
        }

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"phase": self.phase.state_dict(), "speedup": self.speedup.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        self.phase.load_state_dict(state["phase"])
        self.speedup.load_state_dict(state["speedup"])
