"""Builds the objects that a trainer works with, once its model and data are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from grpo_kernels.normalize.methods import function_name

from . import compat
from .advantages.by_task import TaskNames
from .advantages.normalizer import Normalizer, UsedNormalization
from .advantages.prompt_keys import prompt_texts
from .advantages.rewarded import RewardedBatch
from .capabilities import Capabilities, capabilities
from .checkpointed_layers import CheckpointedLayers
from .checkpoints.callbacks import CheckpointState, RandomStates
from .compat import LossSettings, RunSettings, StepPosition
from .compilation import why_compiled
from .compiled_layers import CompiledLayers
from .config import CurvatureGRPOConfig, resolve_normalization, trl_method
from .head.patch import add_forward, fused_heads
from .log_once import LogOnce
from .loss_step import LossStep
from .model_patches import ModelPatches, keep_four_bit_layers_trainable
from .objective.interface import Method
from .options import read_options
from .overrides import overridden
from .plan import log_probs, rules
from .plan.device_memory import DeviceMemory, memory_of
from .plan.log_probs import UsedLogProbs
from .plan.micro_batch import StepRequest
from .plan.micro_batch_size import MicroBatchSize
from .plan.micro_batches import MicroBatches
from .plan.model_limits import ModelLimits
from .plan.rehearsal import Rehearsal, bytes_of_optimizer, tokens_that_fit
from .probe_model import has_engine
from .recorder.recorder import InterferenceRecorder
from .report.completions import KeptCompletions
from .report.run_files import RunFiles, describe_run
from .report.watch import Watch
from .rollout import Overrides, RolloutComponents, Rollouts
from .run_checks import (
    Context,
    check_before_model,
    check_stored_context,
    read_context,
    refuse_tensor_parallelism,
    warn_about_engine,
    warn_about_truncated_sampling,
)
from .stage_seconds import StageSeconds


def before_model(trainer: Any, model: Any, args: Any, rest: Any, kwargs: Any) -> AbstractContextManager[Any]:
    """Checks options and datasets before a model is loaded, and returns the context for the parent's ``__init__``."""
    now = capabilities()
    compat.check_class()
    compat.limit_unscored_warning()
    check_before_model(args, rest, kwargs)
    if not now.has("advantages"):
        refuse_without_advantages(args, now)
        return nullcontext()
    refuse_tensor_parallelism(model, args)
    return compat.without_trl_head(trainer, add_forward) if compat.allowed_options(args).fused_loss else nullcontext()


def refuse_without_advantages(args: Any, now: Capabilities) -> None:
    """Raises ``RuntimeError`` if the run needs advantages that aren't TRL's, and only TRL's work."""
    options = args or CurvatureGRPOConfig
    method, own = resolve_normalization(options)
    if method != trl_method(options.scale_rewards, options.multi_objective_aggregation) or own:
        name = method if isinstance(method, str) else function_name(method)
        raise RuntimeError(
            f"normalization={name!r} doesn't work with the installed TRL ({now.off['advantages']}): install one of the "
            f"versions in docs/versions.md, or use scale_rewards"
        )
    if read_options(args).resample_zero_variance:
        raise RuntimeError(
            f"resample_zero_variance=True doesn't work with the installed TRL ({now.off['advantages']}): install one "
            "of the versions in docs/versions.md"
        )


@dataclass
class Components:
    """The objects of one trainer. ``ours`` is ``CurvatureGRPOTrainer``, with which overrides are compared."""

    trainer: Any
    ours: type
    run: RunSettings
    seconds: StageSeconds
    random_states: RandomStates
    patches: ModelPatches
    normalizer: Normalizer
    recorder: InterferenceRecorder
    micro_batches: MicroBatches
    memory: DeviceMemory | None
    checkpointed: CheckpointedLayers
    compiled: CompiledLayers
    rollouts: Rollouts
    losses: LossStep
    checkpoint_state: CheckpointState
    callbacks: tuple[TrainerCallback, ...]

    def loss_settings(self) -> LossSettings:
        """Reads the current loss settings."""
        own_logprobs = overridden(self.trainer, self.ours, "_get_per_token_logps_and_entropies")
        return compat.read_loss_settings(self.trainer, own_logprobs)

    def overrides(self) -> Overrides:
        """Finds the methods that a subclass overrides and that forbid skipping sequences or postponing log-probs."""
        reason = overridden(self.trainer, self.ours, *log_probs.OWN_METHODS)
        if reason is None and "_get_per_token_logps_and_entropies" in vars(self.trainer):
            reason = "the trainer overrides _get_per_token_logps_and_entropies"
        return Overrides(plan=overridden(self.trainer, self.ours, *rules.OWN_METHODS), log_probs=reason)

    def step_request(self) -> StepRequest:
        """Collects what the plan of the current optimizer step depends on."""
        override = self.overrides().plan
        overridden_here = override is not None or not vars(self.trainer).keys().isdisjoint(rules.OWN_METHODS)
        method: Method | None = None if overridden_here else self.normalizer.own_group
        # if users call training_step and backward themselves, gradient checkpointing would recompute shared rows on
        # a model without our hooks
        by_sequence = self.recorder.recording or not self.patches.active
        return StepRequest(self.loss_settings(), self.rollouts.latest_advantages, method, override, by_sequence)

    def choose_size(self) -> None:
        """Chooses ``tokens_per_micro_batch`` by a rehearsal, at the run's first step; all ranks do it together."""
        memory, self.memory, batches = self.memory, None, self.micro_batches
        if memory is None or batches.size.tokens is not None or batches.limits.not_shared is not None:
            return
        settings = self.loss_settings()
        model = self.run.accelerator.unwrap_model(self.trainer.model)
        rehearsal = Rehearsal(self.run, model, settings, self.checkpointed.limited)
        if not batches.decide_regrouping(rehearsal.batch(1), settings, self.overrides().plan).regrouped:
            return
        needed = bytes_of_optimizer(rehearsal.parameters, self.trainer.optimizer)
        tokens = tokens_that_fit(rehearsal, memory, needed, batches.least_over_ranks)
        if tokens is not None:
            batches.size.choose(tokens)
            self.run.log_once(f"A micro-batch has at most {tokens} packed tokens, which fit into memory.", "info")

    @contextmanager
    def recorded(self, position: StepPosition) -> Iterator[None]:
        """Records a call for the interference log, with uncompiled layers; a step that was repeated isn't logged.

        Calls that aren't recorded may run compiled layers.
        """
        batches = self.micro_batches
        recording: AbstractContextManager[None] = nullcontext()
        if position.optimizer_step != batches.repeated_step:
            recording = self.recorder.micro_batch(position, self.trainer.model, lambda: batches.skipping)
        with recording, self.compiled.allowed(not self.recorder.recording):
            yield

    def drop_interference(self) -> None:
        """Drops what was recorded of the current step, which is repeated."""
        recording = self.recorder.recording
        self.recorder.abandon()  # also if the step isn't logged: else the next one isn't opened
        if recording:
            number = self.micro_batches.repeated_step + 1
            self.run.log_once(f"Interference of optimizer step {number} isn't logged: it ran out of memory.")


def build_components(trainer: Any, ours: type) -> Components | None:
    """Builds the objects of a trainer whose parent's ``__init__`` has run; None if it can only do what TRL's does."""
    if not capabilities().has("advantages"):
        return None
    compat.check_trainer(trainer)
    keep_four_bit_layers_trainable(trainer.model)
    run = compat.read_run_settings(
        trainer, without_metrics(trainer._log_metrics), LogOnce(get_logger("trl_ext.trainer"))
    )
    context = check_run(trainer, run)
    normalizer = Normalizer(run, trainer.args, compat.read_reward_settings(trainer))

    def used() -> UsedNormalization:
        return normalizer.used(trainer.reward_weights)

    recorder = InterferenceRecorder(run, trainer.model, observer=trainer, used=used, score=trainer._score_with_graph)
    if (reason := why_compiled(trainer.args)) is not None:
        run.log_once(f"Layers are compiled: {reason}.")
    compiled = CompiledLayers(run, run.accelerator.unwrap_model(trainer.model))
    patches = patches_of(run, trainer, recorder, compiled)
    kept = KeptCompletions(run.options.interference_every, run.num_generations)

    with patches.applied():
        limits = ModelLimits(run, trainer.model, trainer.ref_model, patches.add)
    size = MicroBatchSize(run.options.tokens_per_micro_batch)
    micro_batches = MicroBatches(run, trainer.model, limits, size)
    used_log_probs = UsedLogProbs(run, micro_batches, trainer.ref_model, trainer.args.gradient_checkpointing_kwargs)
    seconds, random_states = StageSeconds(), RandomStates()
    rollout_components = RolloutComponents(
        context, seconds, normalizer, recorder, micro_batches, used_log_probs, batch_observer(trainer, recorder, kept)
    )
    rollouts = Rollouts(trainer, run, rollout_components)
    on_start = micro_batches.forget, rollouts.generations.forget
    state = CheckpointState(normalizer, recorder, size, on_start=on_start)
    files = RunFiles(lambda: describe_run(trainer.args, trainer.model, type(trainer), trainer.reward_func_names))
    callbacks = (state, random_states, files, Watch(run, trainer._log_metrics), kept)
    return Components(
        trainer=trainer,
        ours=ours,
        run=run,
        seconds=seconds,
        random_states=random_states,
        patches=patches,
        normalizer=normalizer,
        recorder=recorder,
        micro_batches=micro_batches,
        memory=None if has_engine(run.accelerator) else memory_of(run.accelerator.device),
        compiled=compiled,
        checkpointed=CheckpointedLayers(run.accelerator.unwrap_model(trainer.model), run.options.checkpoint_layers),
        rollouts=rollouts,
        losses=LossStep(run, micro_batches),
        checkpoint_state=state,
        callbacks=callbacks,
    )


def without_metrics(log: Callable[[Mapping[str, float]], None]) -> Callable[[Mapping[str, float]], None]:
    """Returns ``log``, which drops the metrics that the installed TRL logs otherwise than we do."""
    dropped = frozenset(capabilities().other_metrics)
    if not dropped:
        return log
    return lambda metrics: log({name: value for name, value in metrics.items() if name not in dropped})


def check_run(trainer: Any, run: RunSettings) -> Context | None:
    """Checks the built trainer's engine, sampling and stored prompts; returns the model's context."""
    refuse_tensor_parallelism(trainer.model, trainer.args)
    warn_about_engine(trainer.args, run.accelerator, run.log_once)
    warn_about_truncated_sampling(trainer.args, run.log_once)
    context = read_context(trainer.processing_class, trainer.model, trainer.args, run.log_once)
    check_stored_context(trainer.train_dataset, context)
    return context


def batch_observer(
    trainer: Any, recorder: InterferenceRecorder, kept: KeptCompletions
) -> Callable[[RewardedBatch, TaskNames, bool], None]:
    """Returns a callback for each training batch; it passes prompts to the recorder, and keeps completions."""

    def on_batch(rewarded: RewardedBatch, task_names: TaskNames, first: bool) -> None:
        def texts_and_tasks() -> tuple[dict[int, str], dict[int, str]]:
            return prompt_texts(trainer._logs["prompt"], rewarded.keys_B), task_names.of_prompts(rewarded)

        recorder.set_prompts(texts_and_tasks, first=first)
        kept.see(trainer._logs)

    return on_batch


def patches_of(
    run: RunSettings, trainer: Any, recorder: InterferenceRecorder, compiled: CompiledLayers
) -> ModelPatches:
    """Returns the patches of the policy and the reference model."""
    patches = ModelPatches()
    patches.add(lambda: recorder.abandon)  # on exit, removes the hooks of a step that raised an exception
    if run.options.fused_loss:
        for patch in fused_heads(run, trainer.model, trainer.ref_model, recorder.head_sketch, compiled.size_of):
            patches.add(patch)
    for patch in compiled.patches():
        patches.add(patch)
    return patches
