"""Normalises the gathered rewards of a batch by the configured method, and keeps the method's state.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all ranks, F reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from grpo_kernels import METHODS, Normalized
from grpo_kernels.normalize.methods import SHARED_OPTIONS
from trl_ext.compat import RewardSettings, RunSettings
from trl_ext.config import resolve_normalization, trl_method

from .compute import compute_advantages, normalization_metrics, number_of_states, observe_rewards
from .normalization_state import make_state, restore_states
from .rewarded import RewardedBatch


@dataclass(frozen=True)
class UsedNormalization:
    """The run's normalisation, with which the what-if analysis compares other methods.

    Attributes:
        name: in ``METHODS``; None for a user's function.
        baseline_size: number of rewards in a sequence's baseline, including its own; 0 if there is no baseline.
        function_weights: weights of the reward functions.
        by_function: whether each reward function is normalised by itself.
    """

    name: str | None
    baseline_size: int
    function_weights: list[float]
    by_function: bool = False


class Normalizer:
    """Turns rewards into advantages. ``follow`` applies changes of TRL's options that a callback makes.

    ``args`` are the trainer's options.
    """

    def __init__(self, run: RunSettings, args: Any, now: RewardSettings) -> None:
        self.run, self.now = run, now
        self.method, self.options = resolve_normalization(args)
        self.follows_trl = getattr(args, "normalization", None) is None
        self.states: list[Any] = []
        self._make_states()

    @property
    def aggregation(self) -> str:
        """TRL's ``multi_objective_aggregation``."""
        return self.now.aggregation

    def _make_states(self) -> None:
        count = number_of_states(self.now.n_functions, self.aggregation)
        self.states = [make_state(self.method, self.options) for _ in range(count)]

    def follow(self, now: RewardSettings) -> None:
        """Applies settings that a callback has changed, as TRL does; warns once of those that have no effect."""
        before, self.now = self.now, now
        if now == before:
            return
        if now.options != before.options:
            names = [field.name for field in fields(now.options)]
            changed = [name for name in names if getattr(now.options, name) != getattr(before.options, name)]
            self.run.log_once(
                f"{', '.join(changed)}: changed while training, which has no effect: these options are read when the "
                "trainer is built."
            )
        if now.scale_rewards != before.scale_rewards and not self.follows_trl:
            self.run.log_once(
                f"scale_rewards={now.scale_rewards!r}, set while training, has no effect: normalization="
                f"{self.method!r} was given, and stays."
            )
        if self.follows_trl:
            self.method = trl_method(now.scale_rewards, now.aggregation)
        if number_of_states(now.n_functions, now.aggregation) != len(self.states):
            self._make_states()

    def used(self, weights_F: torch.Tensor) -> UsedNormalization:
        """Returns the current normalisation, with these weights of the reward functions."""
        by_function = self.aggregation != "sum_then_normalize"
        return UsedNormalization(self.name, self.baseline_size, weights_F.tolist(), by_function)

    @property
    def name(self) -> str | None:
        """The method's name in ``METHODS``; None for a user's function."""
        return self.method if isinstance(self.method, str) else None

    @property
    def own_group(self) -> tuple[str, Mapping[str, Any]] | None:
        """Method and options if a group's advantages depend only on its own weighted rewards; else None."""
        if self.aggregation != "sum_then_normalize" or not isinstance(self.method, str):
            return None
        if not METHODS[self.method].own_group or not SHARED_OPTIONS.keys().isdisjoint(self.options):
            return None
        return self.method, self.options

    @property
    def tolerance(self) -> float:
        """By how much rewards of a dead group may differ; 0 for a user's function."""
        return self.options.get("tolerance", 0.0) if self.name else 0.0

    @property
    def baseline_size(self) -> int:
        """The number of rewards in a sequence's baseline, including its own; 0 if there is no baseline."""
        centre = METHODS[self.method].centre if isinstance(self.method, str) else "group"
        return {"zero": 0, "given": self.run.generation_batch_size}.get(centre, self.run.num_generations)

    def __call__(self, batch: RewardedBatch, *, training: bool) -> tuple[Normalized, dict[str, float]]:
        """Returns the advantages (P, G) and their metrics. Only training batches update the state."""
        state, task_P = self.states[0], batch.task_keys_B[:: batch.num_generations]
        rewards = batch.rewards_BF, batch.weights_F, batch.num_generations
        if training and state.includes_batch:
            observe_rewards(self.states, *rewards, self.aggregation, task_P)
        if not state.ready:
            self.run.log_once(f"normalization={self.method!r} is 'std' {state.not_ready}.")
        normalized = compute_advantages(
            *rewards,
            self.method,
            self.options,
            self.aggregation,
            self.states,
            task_P,
            lengths=batch.lengths_B.view(-1, batch.num_generations).to(batch.rewards_BF.dtype),
            prompt_keys=batch.keys_B[:: batch.num_generations],
        )
        if training and not state.includes_batch:
            observe_rewards(self.states, *rewards, self.aggregation, task_P)
        keep_variance = self.options.get("keep_variance") if self.name else None
        metrics = normalization_metrics(*rewards, self.aggregation, normalized, self.tolerance, keep_variance)
        return normalized, {**metrics, **state.metrics()}

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """Updates the states with measured curvatures (P,) of prompts of the latest batch."""
        for state in self.states:
            state.observe_curvature(prompt_id_P, curvature_P)

    def state_dict(self) -> list[Mapping[str, Any]]:
        """Returns each state as plain numbers, for JSON."""
        return [state.state_dict() for state in self.states]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> bool:
        """Restores the states. Returns False, and restores nothing, if ``saved`` is of another normalisation."""
        return restore_states(self.states, saved)
