"""``CurvatureGRPOTrainer``: which method of TRL's ``GRPOTrainer`` changes, and who does it. In the order of the flow:

reward functions, checked and gathered        rewards/reward_checks.py, rewards/prompt_keys.py
other prompts in place of dead ones           rewards/resampling.py
rewards -> advantages                         rewards/normalizer.py, rewards/advantages.py
TRL's per-sequence dict, and our columns      trl_surface.py, rewards/group_columns.py
old and reference log-probs of what is used   batches/deferred_logprobs.py
micro-batches of what has a gradient          batches/micro_batches.py, batches/skipping.py
backbone, head and loss in one pass           loss/fused_loss.py, loss/fused_head.py
backward: each sequence's gradient            recorder/recorder.py
the log, the run's folder, images, verdicts   recorder/files.py, report/run_files.py, live.py, watch.py
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from trl import GRPOTrainer

from . import trl_surface
from .batches import deferred_logprobs, skipping
from .batches.batch_rows import dead_rows
from .batches.deferred_logprobs import DeferredLogprobs, logprob_inputs, why_complete
from .batches.micro_batches import MicroBatches, micro_batch
from .batches.sampler import sampler_metrics
from .checkpoints.find import find_checkpoint
from .checkpoints.saving import RandomStates, checkpoint_folder, saved_when, whole_or_none
from .checkpoints.state import CheckpointState
from .config import read_options
from .loss.fused_head import CompletionMask, add_forward, fused_heads
from .loss.fused_loss import one_pass_loss, why_not_one_pass, without_tool_logprobs
from .loss.shared_prompts import SharedPrompts
from .loss.statistics import whole_micro_batch_metrics
from .loss.token_weights import token_weights
from .model_patches import ModelPatches
from .overrides import answered_by, ours, overridden
from .paper import PAPER
from .process_group import keep_process_group
from .quantized import keep_trainable
from .recorder.recorder import InterferenceRecorder
from .report.completions import KeptCompletions
from .report.run_files import RunFiles, describe_run
from .report.watch import Watch
from .rewards.group_columns import add_group_columns
from .rewards.normalizer import Normalizer
from .rewards.prompt_keys import prompt_tasks, prompt_texts
from .rewards.resampling import GenerationCount, Resampling
from .rewards.reward_checks import RewardFailed, RewardFailures, checked_rewards, say_if_unscored
from .rewards.rewarded import gather_rewarded, mean_repetition
from .rewards.tasks import TaskMeans, TaskNames, task_sums
from .run_checks import (
    check_batch,
    check_before_model,
    check_stored_context,
    read_context,
    refuse_tensor_parallelism,
    say_engine,
    say_truncated_sampling,
)
from .say_once import SayOnce
from .stage_seconds import StageSeconds


class CurvatureGRPOTrainer(GRPOTrainer):
    """A drop-in ``GRPOTrainer``: the same arguments, with a ``CurvatureGRPOConfig`` (or a plain ``GRPOConfig``).

    It changes ``__init__`` and the methods marked ``@ours``, each by calling its parent's, and nothing else; a
    subclass that overrides one keeps its own, and what we do around it is left out or goes TRL's way, said once.
    (``_generate`` and ``_get_per_token_logps_and_entropies``: tool output isn't projected, and log-probs can wait.)

    With TRL's own normalisations the advantages are TRL's to rounding, except that a group whose rewards are all
    equal gets exactly 0 (TRL's float residue gives up to 6e-4).
    """

    _tag_names: ClassVar = ["trl", "grpo", "curvature-grpo"]
    _name = "Curvature-aware GRPO"
    _paper: ClassVar = PAPER

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        """As the parent's. Raises ``ValueError`` before a model is loaded for options that contradict each other."""
        trl_surface.check_class()
        trl_surface.say_unscored_once()
        check_before_model(args, rest, kwargs)
        refuse_tensor_parallelism(model, args)
        fused = read_options(args).fused_loss
        with trl_surface.without_trl_head(self, add_forward) if fused else nullcontext():
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        trl_surface.check_trainer(self)
        keep_trainable(self.model)
        self._seconds, self._random_states = StageSeconds(), RandomStates()
        self._run = run = trl_surface.read_run_settings(self, self._log_metrics, SayOnce(get_logger(__name__)))
        refuse_tensor_parallelism(self.model, self.args)
        say_engine(self.args, self.accelerator, run.say_once)
        say_truncated_sampling(self.args, run.say_once)
        self._context = read_context(self.processing_class, self.model, self.args, run.say_once)
        check_stored_context(self.train_dataset, self._context)
        self._failures = RewardFailures(self.accelerator.num_processes)
        self._check_reward_functions()
        self._normalizer = Normalizer(run, self.args, trl_surface.read_reward_settings(self))
        self._generations = GenerationCount()
        self._task_names = TaskNames(self.accelerator.num_processes, run.say_once)
        self._task_means = {"train": TaskMeans(), "eval": TaskMeans()}
        self._resampling = Resampling(run, self._normalizer) if run.options.resample_zero_variance else None
        self._interference = InterferenceRecorder(
            run, self.model, observer=self, used=self._used_normalization, score=self._score_with_graph
        )
        self._completion_mask, self._shared_prompts = CompletionMask(), SharedPrompts()
        self._deferred = DeferredLogprobs(run, self._score)
        self._patches = ModelPatches()
        self._patches.add(lambda: self._interference.abandon)  # taps of a step that broke off
        if run.options.fused_loss:
            known = self._completion_mask, self._shared_prompts, self._interference.head_sketch
            for patch in fused_heads(run, self.model, self.ref_model, *known):
                self._patches.add(patch)
        own = overridden(self, *skipping.OWN_METHODS)
        with self._patches.applied():
            self._micro_batches = MicroBatches(run, self.model, self.ref_model, own=own, add_patch=self._patches.add)
        self._checkpoint_state = CheckpointState(
            self._normalizer, self._interference, on_start=(self._micro_batches.forget, self._generations.forget)
        )
        files = RunFiles(lambda: describe_run(self.args, self.model, type(self), self.reward_func_names))
        watch = Watch(run, self._log_metrics)
        self._kept = KeptCompletions(run.options.interference_every, run.num_generations)
        for callback in (self._checkpoint_state, self._random_states, files, watch, self._kept):
            self.add_callback(callback)
        self.is_set_up = True  # else the methods below are the parent's

    # ---- rollouts, rewards, advantages

    def _check_reward_functions(self):
        """Also those that a callback has put there since."""
        functions: Any = vars(self)["reward_funcs"]
        self.reward_funcs = checked_rewards(functions, self.reward_func_names, self._failures)

    @ours
    def _generate(self, prompts):
        check_batch(prompts, self._context, self._run.say_once)
        with self._seconds.stage("generation", self.model.training):
            generated = super()._generate(prompts)
        tool_mask = None if overridden(self, "_generate") else generated[2]  # a subclass may return another
        self._completion_mask.keep(generated[1], tool_mask, self.accelerator.device)
        own = overridden(self, *deferred_logprobs.OWN_METHODS) or self._micro_batches.mixed
        self._deferred.wait(why_complete(self._run.options, self._loss_settings(), own) is None)
        return generated

    def _keep_rewards(self, calculate, inputs, prompts, completions, completion_ids_list):
        """Stands where TRL calls ``_calculate_rewards``: what comes back is of the last subclass that has a say."""
        self._deferred.ready()
        self._check_reward_functions()
        self._normalizer.follow(trl_surface.read_reward_settings(self))
        if self.num_generations != self._run.num_generations:
            self._interference.stop(f"num_generations={self.num_generations} was set while training")
        with self._seconds.stage("rewards", self.model.training):
            rewards_BF = calculate(inputs, prompts, completions, completion_ids_list)
            self._failures.raise_together(self.accelerator.process_index)
        self._log_metrics({"completions/repetition": mean_repetition(completion_ids_list, self.accelerator)})
        say_if_unscored(rewards_BF, self.reward_func_names, self._run.say_once)
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        self._rewarded = gather_rewarded(
            rewards_BF, self.reward_weights, prompts, completion_ids_list, num_generations, self.accelerator,
            tasks := prompt_tasks(inputs),
        )  # fmt: skip
        self._task_names.learn(self._rewarded.task_keys_B, tasks)
        return rewards_BF

    def _generate_and_reward(self, inputs):
        """TRL's dict, its log-probs zeros where they can wait until it is known which sequences are used; rewards."""
        self._deferred.begin()
        if self._resampling is not None:
            self._resampling.begin(self._logs)
        try:
            with answered_by(self, "_calculate_rewards", self._keep_rewards):
                output = super()._generate_and_score_completions(inputs)
        finally:
            self._completion_mask.forget()  # TRL shuffles the rows next
            self._deferred.ready()
        trl_surface.check_batch(output)
        return output, self._rewarded

    @ours
    def _generate_and_score_completions(self, inputs):
        training, step = self.model.training, self.state.global_step
        generation = self._generations.next(step) if training else 0
        output, rewarded = self._generate_and_reward(inputs)
        if training:
            self._micro_batches.ask(self.model)
        if training and self._resampling is not None:
            drawn = {"dataset": self.train_dataset, "step": step, "generation": generation}
            output, rewarded = self._resampling.fill(output, rewarded, self._logs, self._generate_and_reward, **drawn)
        normalized, metrics = self._normalizer(rewarded, training=training)
        mode = "train" if training else "eval"
        self._task_means[mode].into(self._metrics[mode], task_sums(rewarded, normalized, self._task_names.names))
        self._log_metrics(metrics if self._deferred.due else metrics | sampler_metrics(output, self.accelerator))
        trl_surface.replace_latest(self._logs["advantages"], normalized.advantages.flatten().tolist())
        add_group_columns(output, rewarded, normalized, process_index=self.accelerator.process_index)
        if training:

            def known():
                return prompt_texts(self._logs["prompt"], rewarded.keys_B), self._task_names.of_prompts(rewarded)

            self._interference.see_prompts(known, anew=generation == 0)
            self._kept.see(self._logs)
        if self._deferred.due:
            with self._seconds.stage("log_probs", self.model.training):
                used_B = self._micro_batches.used(output, self._loss_settings(), training=training)
                options = {"trim": self._micro_batches.trim, "training": training, "share": self._micro_batches.share}
                options["shared_prompts"] = self._shared_prompts
                self._deferred.fill(output, used_B, self.model, self.ref_model, **options)
        return output

    def _score(self, model, batch, **options):
        """TRL's log-probs (B, T) of a batch's completions, without a gradient; tool output is 0. None: the policy."""
        model = self.model if model is None else model
        ungraded = trl_surface.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), ungraded, self._completion_mask.given(batch.get("tool_mask")):
            return self._get_per_token_logps_and_entropies(model, *logprob_inputs(batch), **options)

    def _score_with_graph(self, batch):
        """The policy's log-probs (B, T) of a batch's completions, as its loss makes them; tool output is 0."""
        with self.accelerator.autocast(), self._completion_mask.given(batch.get("tool_mask")):
            return self._get_per_token_logps_and_entropies(self.model, *logprob_inputs(batch))[0]

    @ours
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **kwargs):
        zeros = self._deferred.answer(input_ids, logits_to_keep, kwargs)
        if zeros is not None:
            return zeros, None, None
        with self._patches.applied(), self._completion_mask.of(len(input_ids), logits_to_keep):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **kwargs
            )

    # ---- from batch to gradient

    @ours
    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        # a backward that a user calls by himself would recompute shared rows on a model without our hooks
        now, by_sequence = trl_surface.read_position(self), self._interference.is_open or not self._patches.active
        return self._micro_batches.next(self._buffered_inputs, now, self._loss_settings(), by_sequence=by_sequence)

    @ours
    def training_step(self, model, inputs, num_items_in_batch=None):
        position, some_skipped = trl_surface.read_position(self), lambda: self._micro_batches.skipping
        logged = self._interference.micro_batch(position, self.model, some_skipped)
        with self._patches.applied(), self._seconds.stage("step"), logged:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if position.last:
            self._log_metrics(self._seconds.take())
        return loss

    @ours
    def compute_loss(self, model, inputs, *rest, **kwargs):
        part = micro_batch(inputs)
        if not part.runs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        if self.model.training:
            position = trl_surface.read_position(self)
            dead = lambda: [*dead_rows(inputs), *part.not_run]  # noqa: E731
            self._interference.rows(inputs, part.skipped, position, self._loss_settings(), dead)
        return super().compute_loss(model, inputs, *rest, **kwargs)

    @ours
    def _compute_loss(self, model, inputs):
        if not self._run.options.fused_loss:
            return super()._compute_loss(model, inputs)
        with self._patches.applied():
            return self._loss(model, inputs)

    def _loss(self, model, inputs):
        settings = self._loss_settings()
        obstacle = why_not_one_pass(settings, inputs)
        if obstacle is None:
            return self._one_pass_loss(model, inputs, settings)
        self._run.say_once(f"The loss isn't made in one pass, but by TRL on our head's log-probs: {obstacle}.")
        with self._completion_mask.given(inputs.get("tool_mask")):
            return super()._compute_loss(model, without_tool_logprobs(inputs))

    def _one_pass_loss(self, model, inputs, settings):
        training, part = self.model.training, micro_batch(inputs)
        # planned sequences keep the weights that they have in TRL's own micro-batches
        weights_B = token_weights(inputs, settings, training=training) if part.whole else inputs["token_weight"]
        accumulation = self.current_gradient_accumulation_steps if training else 1.0
        options = {"autocast": self.accelerator.autocast(), "shared": part.packed > 0}
        one = one_pass_loss(model, inputs, weights_B, settings, accumulation, **options)
        last = training and self.accelerator.sync_gradients
        if part.whole:
            self._log_metrics(whole_micro_batch_metrics(one, settings, self.accelerator, last=last))
        else:
            self._micro_batches.record(part, one.statistics_BS, last_of_step=last)
        return one.loss

    def _loss_settings(self):
        own_logprobs = overridden(self, "_get_per_token_logps_and_entropies")
        return trl_surface.read_loss_settings(self, self._normalizer.own_group, own_logprobs)

    # ---- signals, log, checkpoints, end

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """For ``curvature``: measured curvatures of prompts of the latest batch; the same on every process."""
        self._normalizer.observe_curvature(prompt_id_P, curvature_P)

    def _used_normalization(self):
        return self._normalizer.used(self.reward_weights)

    def _log_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    @ours
    def train(self, resume_from_checkpoint=None, *rest, **kwargs):
        """As the parent's; ``resume_from_checkpoint`` may be "auto", and broken checkpoints are passed over."""
        found = find_checkpoint(resume_from_checkpoint, self.args.output_dir, get_logger(__name__).warning)
        with self._patches.applied(), saved_when(RewardFailed, self, self._random_states):
            return super().train(found, *rest, **kwargs)

    @ours
    def evaluate(self, *args, **kwargs):
        with self._patches.applied():
            return super().evaluate(*args, **kwargs)

    @ours
    def predict(self, *args, **kwargs):
        with self._patches.applied():
            return super().predict(*args, **kwargs)

    @ours
    def _save_checkpoint(self, model, trial):
        self._checkpoint_state.save(self.state)
        with whole_or_none(checkpoint_folder(self), self.args.output_dir):
            super()._save_checkpoint(model, trial)

    @ours
    def end(self):
        keep_process_group()
        super().end()
