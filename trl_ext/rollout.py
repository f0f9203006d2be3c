"""Makes a generation batch with our advantages: the work of ``_generate_and_score_completions``.

TRL generates completions, computes old and reference log-probs, then rewards -> ``RewardedBatch`` of all ranks ->
resampling of dead prompts, if it is on -> advantages (``advantages/normalizer.py``) -> TRL's dict with our columns ->
log-probs of the sequences that the loss will use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .advantages.by_task import TaskMeans, TaskNames, task_sums
from .advantages.group_columns import group_columns
from .advantages.normalizer import Normalizer
from .advantages.prompt_keys import prompt_tasks
from .advantages.resampling import GenerationCount, Resampling
from .advantages.reward_checks import RewardFailures, checked_rewards, warn_if_unscored
from .advantages.rewarded import RewardedBatch, gather_rewarded, mean_repetition
from .advantages.sampler_metrics import sampler_metrics
from .compat import LossSettings, RunSettings, read_reward_settings, replace_latest
from .overrides import wrapped_methods
from .plan.log_probs import UsedLogProbs, why_not_postponed
from .plan.micro_batches import MicroBatches
from .run_checks import Context, check_batch
from .schema import Batch, Sequences, check_keys
from .stage_seconds import StageSeconds


@dataclass(frozen=True)
class Overrides:
    """The reasons to log if a subclass overrides methods that our shortcuts bypass; None if it doesn't.

    ``plan``: methods of ``rules.OWN_METHODS``. ``log_probs``: methods of ``log_probs.OWN_METHODS``.
    """

    plan: str | None
    log_probs: str | None


@dataclass(frozen=True)
class RolloutComponents:
    """The components that ``Rollouts`` uses.

    ``on_batch(rewarded, task_names, first)`` is called with each training batch; ``first``: the first of its optimizer
    step.
    """

    context: Context | None
    seconds: StageSeconds
    normalizer: Normalizer
    recorder: Any
    micro_batches: MicroBatches
    log_probs: UsedLogProbs
    on_batch: Callable[[RewardedBatch, TaskNames, bool], None]


Generate = Callable[[list[Mapping[str, Any]]], Batch]  # GRPOTrainer._generate_and_score_completions


@dataclass
class Rollout:
    """Runs TRL's ``_generate_and_score_completions`` once, with wrappers around three methods that it calls.

    ``postpone``: whether the log-probs that TRL computes between generation and rewards can be postponed; TRL then
    gets zeros, and ``postponed`` becomes True.
    """

    trainer: Any
    check_prompts: Callable[[Any], None]
    calculate_rewards: Callable[..., tuple[torch.Tensor, RewardedBatch]]
    seconds: StageSeconds
    postpone: bool
    rewarded: RewardedBatch | None = None
    postponed: bool = False
    _stage: str = "generation"

    def run(self, generate: Generate, inputs: Any) -> Batch:
        """Returns TRL's dict of the generation batch."""
        wrappers: dict[str, Callable[..., Any]] = {"_generate": self._generate, "_calculate_rewards": self._rewards}
        if self.postpone:
            wrappers["_get_per_token_logps_and_entropies"] = self._log_probs
        with wrapped_methods(self.trainer, **wrappers):
            return generate(inputs)

    def _generate(self, generate: Callable[..., Any], prompts: Any) -> Any:
        self.check_prompts(prompts)
        with self.seconds.stage("generation", self.trainer.model.training):
            generated = generate(prompts)
        self._stage = "log-probs"
        return generated

    def _log_probs(
        self,
        compute: Callable[..., Any],
        model: Any,
        input_ids: Any,
        mask: Any,
        width: int,
        batch_size: int | None = None,
        **named: Any,
    ) -> Any:
        """Wraps ``_get_per_token_logps_and_entropies``: returns zeros if TRL's call can be postponed."""
        other_arguments = any(value is not None for value in named.values())
        if self._stage != "log-probs" or other_arguments:
            return compute(model, input_ids, mask, width, batch_size=batch_size, **named)
        self.postponed = True
        return torch.zeros(len(input_ids), width, device=input_ids.device), None, None

    def _rewards(self, calculate: Callable[..., Any], inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        """Wraps ``_calculate_rewards``, so that a subclass's changes are included."""
        self._stage = "rewards"
        rewards_BF, self.rewarded = self.calculate_rewards(calculate, inputs, prompts, completions, ids)
        return rewards_BF


class Rollouts:
    """Makes a trainer's generation batches, with our advantages.

    ``latest_advantages`` (P, G) are the advantages of the latest training batch, of all ranks.
    """

    def __init__(self, trainer: Any, run: RunSettings, components: RolloutComponents) -> None:
        self.trainer, self.run, self.components = trainer, run, components
        self.latest_advantages: torch.Tensor | None = None
        self.failures = RewardFailures(run.accelerator.num_processes)
        self.wrap_reward_functions()
        self.generations = GenerationCount()
        self.task_names = TaskNames(run.accelerator.num_processes, run.log_once)
        self.task_means = {"train": TaskMeans(), "eval": TaskMeans()}
        self.resampling = Resampling(run, components.normalizer) if run.options.resample_zero_variance else None

    def wrap_reward_functions(self) -> None:
        """Wraps the reward functions in checks, also those that a callback has added since."""
        trainer = self.trainer
        functions: Any = vars(trainer)["reward_funcs"]
        trainer.reward_funcs = checked_rewards(functions, trainer.reward_func_names, self.failures)

    def batch(self, generate: Generate, inputs: Any, settings: LossSettings, overrides: Overrides) -> Batch:
        """Returns TRL's dict of one generation batch, with our columns.

        ``overrides``: the methods that a subclass overrides, which forbid skipping or postponing.
        """
        trainer, components = self.trainer, self.components
        training, step = trainer.model.training, trainer.state.global_step
        generation = self.generations.next(step) if training else 0
        obstacle = overrides.log_probs or overrides.plan or components.micro_batches.mixed
        if not self.run.capabilities.has("defer"):
            obstacle = "the installed TRL doesn't allow it"
        postpone = why_not_postponed(self.run.options, settings, obstacle) is None
        postponed, answers = False, 0

        def run_rollout(examples: Any) -> tuple[Batch, RewardedBatch]:
            nonlocal postponed, answers
            rollout = Rollout(trainer, self._check_prompts, self._calculate_rewards, components.seconds, postpone)
            output, rewarded = self._run_rollout(rollout, generate, examples)
            postponed |= rollout.postponed
            answers += len(rewarded.lengths_B)
            return output, rewarded

        output, rewarded = run_rollout(inputs)
        if training:
            components.recorder.observe_rewards(rewarded.rewards)
            components.micro_batches.limits.probe(trainer.model)
            if self.resampling is not None:
                source = {"dataset": trainer.train_dataset, "step": step, "generation": generation}
                output, rewarded = self.resampling.fill(output, rewarded, trainer._logs, run_rollout, **source)
        output = self._with_advantages(output, rewarded, answers, training=training, postponed=postponed)
        if training:
            components.on_batch(rewarded, self.task_names, generation == 0)
        if not postponed:
            return output
        with components.seconds.stage("log_probs", training):
            rows = Sequences(output)
            used_B = components.micro_batches.used(rows, settings, overrides.plan, training=training)
            return output | components.log_probs.columns(rows, used_B, trainer.model, training=training)

    def _run_rollout(self, rollout: Rollout, generate: Generate, examples: Any) -> tuple[Batch, RewardedBatch]:
        if self.resampling is not None:
            self.resampling.begin(self.trainer._logs)
        output = rollout.run(generate, examples)
        check_keys(output)
        assert rollout.rewarded is not None
        return output, rollout.rewarded

    def _check_prompts(self, prompts: Any) -> None:
        check_batch(prompts, self.components.context, self.run.log_once)

    def _calculate_rewards(
        self, calculate: Callable[..., Any], inputs: Any, prompts: Any, completions: Any, completion_ids: Any
    ) -> tuple[torch.Tensor, RewardedBatch]:
        """Returns the rewards (B, F) of all ranks for TRL, and the ``RewardedBatch`` for our advantages."""
        trainer, accelerator = self.trainer, self.run.accelerator
        self.wrap_reward_functions()
        self.components.normalizer.follow(read_reward_settings(trainer))
        if trainer.num_generations != self.run.num_generations:
            self.components.recorder.stop(f"num_generations={trainer.num_generations} was set while training")
        with self.components.seconds.stage("rewards", trainer.model.training):
            rewards_BF = calculate(inputs, prompts, completions, completion_ids)
            self.failures.raise_on_all_ranks(accelerator.process_index)
        self.run.log({"completions/repetition": mean_repetition(completion_ids, accelerator)})
        warn_if_unscored(rewards_BF, trainer.reward_func_names, self.run.log_once)
        num_generations = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        tasks = prompt_tasks(inputs)
        rewarded = gather_rewarded(
            rewards_BF, trainer.reward_weights, prompts, completion_ids, num_generations, accelerator, tasks
        )
        self.task_names.learn(rewarded.task_keys_B, tasks)
        return rewards_BF, rewarded

    def _with_advantages(
        self, output: Batch, rewarded: RewardedBatch, answers: int, *, training: bool, postponed: bool
    ) -> Batch:
        """Computes the advantages and logs their metrics. Returns TRL's dict with our columns.

        ``answers``: how many were generated for this batch.
        """
        trainer, mode = self.trainer, "train" if training else "eval"
        normalized, metrics = self.components.normalizer(rewarded, training=training)
        sums = task_sums(rewarded, normalized, self.task_names.names, self.components.normalizer.tolerance)
        if training:
            live = round((1 - metrics["normalization/zero_variance_frac"]) * len(rewarded.rewards))
            sums["compute/answers_per_live_group"] = answers, live
        self.task_means[mode].into(trainer._metrics[mode], sums)
        self.run.log(metrics if postponed else metrics | sampler_metrics(Sequences(output), self.run.accelerator))
        replace_latest(trainer._logs["advantages"], normalized.advantages.flatten().tolist())
        if training:
            self.latest_advantages = normalized.advantages.view(-1, rewarded.num_generations)
        n_local, rank = len(Sequences(output)), self.run.accelerator.process_index
        return output | group_columns(rewarded, normalized, n_local, rank)
