"""``CurvatureGRPOTrainer``: which methods of TRL's ``GRPOTrainer`` change, and which file does the work.

In the order of the data flow:

reward functions, checked and gathered        rollout.py, advantages/reward_checks.py
other prompts in place of dead ones           advantages/resampling.py
rewards -> advantages                         advantages/normalizer.py, advantages/compute.py
TRL's per-sequence dict, and our columns      schema.py, advantages/group_columns.py
old and reference log-probs of what is used   plan/log_probs.py
micro-batches of what has a gradient          plan/micro_batches.py, plan/step_plan.py, plan/rules.py
backbone, head and loss in one pass           loss_step.py, objective/fused.py, head/forward.py
backward: each sequence's gradient            recorder/recorder.py
the log, the run's folder, verdicts           recorder/files.py, report/run_files.py, report/watch.py

What these work with is built in ``parts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from trl import GRPOTrainer

from .advantages.reward_checks import RewardFailed
from .checkpoints.find import find_checkpoint
from .checkpoints.save import checkpoint_folder, complete_or_none, saved_when
from .compat import read_position
from .paper import PAPER
from .parts import Parts, before_model, build_parts
from .plan.micro_batches import micro_batch
from .plan.rules import dead_sequences
from .process_group import keep_process_group
from .schema import Batch, Sequences


def parts_of(trainer: Any) -> Parts | None:
    """None without ``__init__``, as TRL's own tests make trainers and mocks: every method is the parent's then."""
    return vars(trainer).get("_parts")


def applied(trainer: Any) -> AbstractContextManager[None]:
    """The context in which the trainer's model has our head and hooks."""
    parts = parts_of(trainer)
    return nullcontext() if parts is None else parts.patches.applied()


class CurvatureGRPOTrainer(GRPOTrainer):
    """A drop-in ``GRPOTrainer``: the same arguments, with a ``CurvatureGRPOConfig`` (or a plain ``GRPOConfig``).

    It overrides ``__init__`` and the methods below, each of which calls its parent's. A subclass that overrides one
    keeps its own; what we do around it is left out or goes TRL's way, and the log says so once.

    With TRL's own normalisations the advantages are TRL's to rounding, except that a group whose rewards are all
    equal gets exactly 0 (TRL's float residue gives up to 6e-4).
    """

    _tag_names: ClassVar = ["trl", "grpo", "curvature-grpo"]
    _name = "Curvature-aware GRPO"
    _paper: ClassVar = PAPER

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        """As the parent's. Raises ``ValueError`` before a model is loaded for options that contradict each other."""
        with before_model(self, model, args, rest, kwargs):
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._parts = build_parts(self, CurvatureGRPOTrainer)
        for callback in self._parts.callbacks:
            self.add_callback(callback)

    # ---- rollouts, rewards, advantages

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """TRL's dict, with our advantages and columns."""
        generate = super()._generate_and_score_completions
        if (parts := parts_of(self)) is None:
            return generate(inputs)
        return parts.rollouts.batch(generate, inputs, parts.loss_settings(), parts.owners())

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, on a model that has our head."""
        with applied(self):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _score_with_graph(self, batch: Sequences) -> torch.Tensor:
        """The policy's log-probs (B, T) of a batch's completions, as its loss makes them."""
        inputs = batch.input_ids, batch.attention_mask, batch.width
        return self._get_per_token_logps_and_entropies(self.model, *inputs)[0]

    # ---- from batch to gradient

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """In training the next micro-batch of what has a gradient."""
        inputs = super()._prepare_inputs(generation_batch)
        if (parts := parts_of(self)) is None or not self.model.training:
            return inputs
        return parts.micro_batches.next(self._buffered_inputs, read_position(self), parts.step_request())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """With the gradients recorded, in steps that log interference."""
        if (parts := parts_of(self)) is None:
            return super().training_step(model, inputs, num_items_in_batch)
        position = read_position(self)
        recorded = parts.recorder.micro_batch(position, self.model, lambda: parts.micro_batches.skipping)
        with applied(self), parts.seconds.stage("step"), recorded:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if position.last:
            self._log_metrics(parts.seconds.take())
        return loss

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        """0 without a forward pass where nothing is to be run."""
        part = micro_batch(inputs)
        if not part.runs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if (parts := parts_of(self)) is not None and self.model.training:
            rows = Sequences(inputs)

            def dead() -> list[Sequences]:
                return [*dead_sequences(rows), *part.not_run]

            parts.recorder.rows(rows, part.skipped, read_position(self), parts.loss_settings(), dead)
        return super().compute_loss(model, inputs, *rest, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """The loss in one pass over the head, where it is a sum over single tokens."""
        compute = super()._compute_loss
        if (parts := parts_of(self)) is None or not parts.run.options.fused_loss:
            return compute(model, inputs)
        accumulation = self.current_gradient_accumulation_steps if self.model.training else None
        with applied(self):
            return parts.losses.loss(model, inputs, parts.loss_settings(), compute, accumulation)

    # ---- signals, log, checkpoints, end

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """For ``curvature``: measured curvatures of prompts of the latest batch; the same on every rank."""
        if (parts := parts_of(self)) is not None:
            parts.normalizer.observe_curvature(prompt_id_P, curvature_P)

    def _log_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """As the parent's; ``resume_from_checkpoint`` may be "auto", and broken checkpoints are passed over."""
        if (parts := parts_of(self)) is None:
            return super().train(resume_from_checkpoint, *rest, **kwargs)
        found = find_checkpoint(resume_from_checkpoint, self.args.output_dir, get_logger(__name__).warning)
        with applied(self), saved_when(RewardFailed, self, parts.random_states):
            return super().train(found, *rest, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with our head."""
        with applied(self):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with our head."""
        with applied(self):
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Whole, with our state in it, or not at all."""
        if (parts := parts_of(self)) is None:
            return super()._save_checkpoint(model, trial)
        parts.checkpoint_state.save(self.state)
        with complete_or_none(checkpoint_folder(self), self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def end(self) -> None:
        """As the parent's; the process group outlives the trainer."""
        keep_process_group()
        super().end()
