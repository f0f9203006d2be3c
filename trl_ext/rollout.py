"""From TRL's rollouts to a batch with our advantages: what happens in ``_generate_and_score_completions``.

TRL generates, asks for old and reference log-probs, then for rewards -> ``RewardedBatch`` of all ranks -> maybe other
prompts in place of dead ones -> advantages (``advantages/normalizer.py``) -> TRL's dict with our columns -> the
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
from .advantages.reward_checks import RewardFailures, checked_rewards, say_if_unscored
from .advantages.rewarded import RewardedBatch, gather_rewarded, mean_repetition
from .advantages.sampler_metrics import sampler_metrics
from .compat import LossSettings, RunSettings, read_reward_settings, replace_latest
from .overrides import answered_by
from .plan.log_probs import UsedLogProbs, why_complete
from .plan.micro_batches import MicroBatches
from .run_checks import Context, check_batch
from .schema import Batch, Sequences, check_keys
from .stage_seconds import StageSeconds


@dataclass(frozen=True)
class Owners:
    """What to say of a method that a subclass has of its own, or None: of ``rules.OWN_METHODS``, of
    ``log_probs.OWN_METHODS``."""

    plan: str | None
    log_probs: str | None


@dataclass(frozen=True)
class RolloutParts:
    """What ``Rollouts`` works with. ``on_batch`` (rewarded, task names, whether it is the step's first batch) is called
    with each training batch."""

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
    """One call of TRL's ``_generate_and_score_completions``, by the three methods that it calls on the way.

    ``postpone``: log-probs that TRL asks for between generation and rewards can wait, and are answered with zeros.
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
        """TRL's dict."""
        with answered_by(
            self.trainer,
            _generate=self._generate,
            _get_per_token_logps_and_entropies=self._log_probs,
            _calculate_rewards=self._rewards,
        ):
            return generate(inputs)

    def _generate(self, generate: Callable[..., Any], prompts: Any) -> Any:
        self.check_prompts(prompts)
        with self.seconds.stage("generation", self.trainer.model.training):
            generated = generate(prompts)
        self._stage = "log-probs"
        return generated

    def _log_probs(
        self, compute: Callable[..., Any], model: Any, input_ids: Any, mask: Any, width: int, **named: Any
    ) -> Any:
        """Wraps ``_get_per_token_logps_and_entropies``: zeros where TRL's own call can wait."""
        more_wanted = any(value is not None for name, value in named.items() if name != "batch_size")
        if self._stage != "log-probs" or not self.postpone or more_wanted:
            return compute(model, input_ids, mask, width, **named)
        self.postponed = True
        return torch.zeros(len(input_ids), width, device=input_ids.device), None, None

    def _rewards(self, calculate: Callable[..., Any], inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        """Wraps ``_calculate_rewards``, so that a subclass's changes are included."""
        self._stage = "rewards"
        rewards_BF, self.rewarded = self.calculate_rewards(calculate, inputs, prompts, completions, ids)
        return rewards_BF


class Rollouts:
    """Makes a trainer's generation batches, with our advantages.

    ``latest_advantages`` (P, G): those of the latest training batch, of all ranks.
    """

    def __init__(self, trainer: Any, run: RunSettings, parts: RolloutParts) -> None:
        self.trainer, self.run, self.parts = trainer, run, parts
        self.latest_advantages: torch.Tensor | None = None
        self.failures = RewardFailures(run.accelerator.num_processes)
        self.check_reward_functions()
        self.generations = GenerationCount()
        self.task_names = TaskNames(run.accelerator.num_processes, run.say_once)
        self.task_means = {"train": TaskMeans(), "eval": TaskMeans()}
        self.resampling = Resampling(run, parts.normalizer) if run.options.resample_zero_variance else None

    def check_reward_functions(self) -> None:
        """Wraps reward functions in checks, also those that a callback has put there since."""
        trainer = self.trainer
        functions: Any = vars(trainer)["reward_funcs"]
        trainer.reward_funcs = checked_rewards(functions, trainer.reward_func_names, self.failures)

    def batch(self, generate: Generate, inputs: Any, settings: LossSettings, own: Owners) -> Batch:
        """TRL's dict of one generation, with our columns.

        ``own``: what subclasses have of the methods that the plan and the postponed log-probs depend on.
        """
        trainer, parts = self.trainer, self.parts
        training, step = trainer.model.training, trainer.state.global_step
        generation = self.generations.next(step) if training else 0
        postpone = why_complete(self.run.options, settings, own.log_probs or own.plan or parts.micro_batches.mixed)
        postponed = False

        def answer(examples: Any) -> tuple[Batch, RewardedBatch]:
            nonlocal postponed
            rollout = Rollout(trainer, self._check_prompts, self._calculate_rewards, parts.seconds, postpone is None)
            output, rewarded = self._answer(rollout, generate, examples)
            postponed |= rollout.postponed
            return output, rewarded

        output, rewarded = answer(inputs)
        if training:
            parts.micro_batches.limits.probe(trainer.model)
            if self.resampling is not None:
                drawn = {"dataset": trainer.train_dataset, "step": step, "generation": generation}
                output, rewarded = self.resampling.fill(output, rewarded, trainer._logs, answer, **drawn)
        output = self._with_advantages(output, rewarded, training=training, postponed=postponed)
        if training:
            parts.on_batch(rewarded, self.task_names, generation == 0)
        if not postponed:
            return output
        with parts.seconds.stage("log_probs", training):
            rows = Sequences(output)
            used_B = parts.micro_batches.used(rows, settings, own.plan, training=training)
            return output | parts.log_probs.columns(rows, used_B, trainer.model, training=training)

    def _answer(self, rollout: Rollout, generate: Generate, examples: Any) -> tuple[Batch, RewardedBatch]:
        if self.resampling is not None:
            self.resampling.begin(self.trainer._logs)
        output = rollout.run(generate, examples)
        check_keys(output)
        assert rollout.rewarded is not None
        return output, rollout.rewarded

    def _check_prompts(self, prompts: Any) -> None:
        check_batch(prompts, self.parts.context, self.run.say_once)

    def _calculate_rewards(
        self, calculate: Callable[..., Any], inputs: Any, prompts: Any, completions: Any, completion_ids: Any
    ) -> tuple[torch.Tensor, RewardedBatch]:
        """(B, F) rewards of all ranks as TRL takes them, and what else of the batch the advantages depend on."""
        trainer, accelerator = self.trainer, self.run.accelerator
        self.check_reward_functions()
        self.parts.normalizer.follow(read_reward_settings(trainer))
        if trainer.num_generations != self.run.num_generations:
            self.parts.recorder.stop(f"num_generations={trainer.num_generations} was set while training")
        with self.parts.seconds.stage("rewards", trainer.model.training):
            rewards_BF = calculate(inputs, prompts, completions, completion_ids)
            self.failures.raise_together(accelerator.process_index)
        self.run.log({"completions/repetition": mean_repetition(completion_ids, accelerator)})
        say_if_unscored(rewards_BF, trainer.reward_func_names, self.run.say_once)
        num_generations = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        tasks = prompt_tasks(inputs)
        rewarded = gather_rewarded(
            rewards_BF, trainer.reward_weights, prompts, completion_ids, num_generations, accelerator, tasks
        )
        self.task_names.learn(rewarded.task_keys_B, tasks)
        return rewards_BF, rewarded

    def _with_advantages(self, output: Batch, rewarded: RewardedBatch, *, training: bool, postponed: bool) -> Batch:
        """TRL's dict with our advantages and columns, and their metrics logged."""
        trainer, mode = self.trainer, "train" if training else "eval"
        normalized, metrics = self.parts.normalizer(rewarded, training=training)
        sums = task_sums(rewarded, normalized, self.task_names.names)
        self.task_means[mode].into(trainer._metrics[mode], sums)
        self.run.log(metrics if postponed else metrics | sampler_metrics(Sequences(output), self.run.accelerator))
        replace_latest(trainer._logs["advantages"], normalized.advantages.flatten().tolist())
        if training:
            self.latest_advantages = normalized.advantages.view(-1, rewarded.num_generations)
        n_local, rank = len(Sequences(output)), self.run.accelerator.process_index
        return output | group_columns(rewarded, normalized, n_local, rank)
