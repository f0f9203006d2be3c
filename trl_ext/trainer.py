"""Defines ``CurvatureGRPOTrainer``: the methods of TRL's ``GRPOTrainer`` that it overrides, each in a few lines.

The work is done in other files. In the order of the data flow:

check and gather rewards                      rollout.py, advantages/reward_checks.py
replace dead prompts by others                advantages/resampling.py
rewards -> advantages                         advantages/normalizer.py, advantages/compute.py
TRL's per-sequence dict, and our columns      schema.py, advantages/group_columns.py
old and reference log-probs                   plan/log_probs.py
micro-batches of sequences with a gradient    plan/micro_batches.py, plan/step_plan.py, plan/rules.py
their size, and a step out of memory          plan/rehearsal.py, plan/micro_batch_size.py, plan/run_call.py
backbone, head and loss in one pass           loss_step.py, objective/fused.py, head/forward.py
backward: each sequence's gradient            recorder/recorder.py
log, run folder, warnings                     report/run_files.py, report/watch.py

``components.py`` builds the objects that do this work.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from .advantages.reward_checks import RewardFailed
from .checkpoints.callbacks import RunCompleteError
from .checkpoints.find import AUTO, find_checkpoint
from .checkpoints.save import checkpoint_folder, complete_or_none, saved_when
from .compat import TRL_HAS_HEAD, compile_no_whole_model, read_position, within_last_call
from .components import Components, before_model, build_components
from .console import use_console
from .head.forward import score_as_trl
from .objective.token_weights import token_weights
from .paper import PAPER
from .plan.micro_batch import micro_batch
from .plan.rules import dead_sequences
from .plan.run_call import run_call
from .process_group import keep_process_group
from .schema import Batch, Sequences


def components_of(trainer: Any) -> Components | None:
    """Returns the trainer's components; None for a trainer built without ``__init__``, as TRL's own tests build mocks.

    Without them, every method does what TRL's does.
    """
    return vars(trainer).get("_components")


def applied(trainer: Any) -> AbstractContextManager[None]:
    """Returns the context in which the trainer's model has our head and hooks."""
    components = components_of(trainer)
    return nullcontext() if components is None else components.patches.applied()


class CurvatureGRPOTrainer(GRPOTrainer):
    """A drop-in ``GRPOTrainer``: it takes the same arguments, with a ``CurvatureGRPOConfig`` or a plain ``GRPOConfig``.

    It overrides the methods below, and each calls its parent's. If a subclass overrides one of them, the subclass's
    method runs; where our shortcuts would bypass it, the trainer falls back to TRL's way and logs that once.

    With TRL's own normalisations the advantages equal TRL's up to rounding, except that a group whose rewards are all
    equal gets exactly 0 (in TRL a float residue gives up to 6e-4).
    """

    _tag_names: ClassVar = ["trl", "grpo", "curvature-grpo"]
    _name = "Curvature-aware GRPO"
    _paper: ClassVar = PAPER

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        """Builds the trainer. Raises ``ValueError`` for contradicting options before it loads a model."""
        with before_model(self, model, args, rest, kwargs):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if (components := build_components(self, CurvatureGRPOTrainer)) is None:
            return
        self._components = components
        for callback in components.callbacks:
            self.add_callback(callback)
        self.stage_seconds = components.seconds
        use_console(self)

    def create_accelerator_and_postprocess(self) -> None:
        """Makes accelerate's objects as the parent does. Our trainer compiles single layers, not the whole model."""
        super().create_accelerator_and_postprocess()
        compile_no_whole_model(self)

    # ---- rollouts, rewards, advantages

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """Returns TRL's dict, with our advantages and columns."""
        generate = super()._generate_and_score_completions
        if (components := components_of(self)) is None:
            return generate(inputs)
        with applied(self):
            return components.rollouts.batch(generate, inputs, components.loss_settings(), components.overrides())

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Runs TRL's method on the model with our head; a TRL without a head of its own is given ours."""
        components = components_of(self)
        with applied(self):
            if TRL_HAS_HEAD or components is None or not components.run.options.fused_loss:
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            scored = score_as_trl(self.accelerator.autocast, *args, **kwargs)
            return scored or super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _score_with_graph(self, batch: Sequences) -> torch.Tensor:
        """Returns the policy's log-probs (B, T) of the completions, with their graph, as the loss computes them."""
        inputs = batch.input_ids, batch.attention_mask, batch.width
        return self._get_per_token_logps_and_entropies(self.model, *inputs)[0]

    # ---- from batch to gradient

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Returns the next micro-batch; in training it holds only sequences with a gradient."""
        components = components_of(self)
        if components is not None and components.micro_batches.waiting:
            return components.micro_batches.next_waiting()
        inputs = super()._prepare_inputs(generation_batch)
        if components is None or not self.model.training:
            return inputs
        return components.micro_batches.next(self._buffered_inputs, read_position(self), components.step_request())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs forward and backward of a call's micro-batches; records gradients in steps that log interference."""
        if (components := components_of(self)) is None:
            return super().training_step(model, inputs, num_items_in_batch)
        first = partial(super().training_step, model, inputs, num_items_in_batch)

        def further() -> torch.Tensor:
            with within_last_call(self):
                return super(GRPOTrainer, self).training_step(model, inputs, num_items_in_batch)

        position = read_position(self)
        with applied(self), components.seconds.stage("step"):
            components.choose_size()
            with components.recorded(position):
                loss = run_call(components.micro_batches, first, further, components.drop_interference)
        if position.last:
            components.micro_batches.end_step()
            self._log_metrics(components.seconds.take())
        return loss

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        """Returns the micro-batch's loss; 0, without a forward pass, if the plan leaves this call empty."""
        part = micro_batch(inputs)
        if not part.runs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if (components := components_of(self)) is None:
            return super().compute_loss(model, inputs, *rest, **kwargs)
        if self.model.training:
            rows, settings = Sequences(inputs), components.loss_settings()
            if part.is_trls and components.run.options.interference_every:
                rows = rows.with_columns(token_weight=token_weights(rows, settings, training=True))

            def dead() -> list[Sequences]:
                return [*dead_sequences(rows), *part.not_run]

            components.recorder.add(rows, part.skipped, read_position(self), settings, dead)
        with components.checkpointed.limited():
            return super().compute_loss(model, inputs, *rest, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """Computes the loss in one pass over the head if it is a sum over single tokens; else TRL computes it."""
        compute = super()._compute_loss
        if (components := components_of(self)) is None or not components.run.options.fused_loss:
            return compute(model, inputs)
        accumulation = self.current_gradient_accumulation_steps if self.model.training else None
        with applied(self):
            return components.losses.loss(model, inputs, components.loss_settings(), compute, accumulation)

    # ---- signals, log, checkpoints, end

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """Passes measured curvatures to the normalisation ``curvature``. Call it with the same values on every rank.

        Args:
            prompt_id_P: (P,) ``prompt_id`` of some prompts of the latest batch.
            curvature_P: (P,) their curvatures.
        """
        if (components := components_of(self)) is not None:
            components.normalizer.observe_curvature(prompt_id_P, curvature_P)

    def _log_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Trains as the parent does. ``resume_from_checkpoint="auto"`` resumes from the newest checkpoint, if any.

        It skips incomplete checkpoints, and so does True. With "auto" a run that is complete isn't trained further.
        """
        if (components := components_of(self)) is None:
            return super().train(resume_from_checkpoint, *rest, **kwargs)
        found = find_checkpoint(resume_from_checkpoint, self.args.output_dir, get_logger(__name__).warning)
        components.checkpoint_state.stops_complete_runs = resume_from_checkpoint == AUTO
        try:
            with applied(self), saved_when(RewardFailed, self, components.random_states):
                return super().train(found, *rest, **kwargs)
        except RunCompleteError:
            return TrainOutput(self.state.global_step, 0.0, {})

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as the parent does, with our head."""
        with applied(self):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts as the parent does, with our head."""
        with applied(self):
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a checkpoint with our state in it. A save that fails leaves no incomplete folder."""
        if (components := components_of(self)) is None:
            return super()._save_checkpoint(model, trial)
        components.checkpoint_state.save(self.state)
        saving = components.seconds.stage("saving", counts=False)
        with saving, complete_or_none(checkpoint_folder(self), self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def end(self) -> None:
        """Ends the run as the parent does, and keeps the process group alive (see ``process_group.py``)."""
        keep_process_group()
        parent: Any = super()
        if hasattr(parent, "end"):
            parent.end()
        else:  # an older transformers
            self.accelerator.end_training()
