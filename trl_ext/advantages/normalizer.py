"""The gathered rewards of a batch become advantages by the method that the options name, with its state.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all processes, F reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from grpo_kernels import METHODS, Normalized
from trl_ext.compat import RewardSettings, RunSettings
from trl_ext.config import resolve_normalization, trl_method

from .compute import compute_advantages, normalization_metrics, number_of_states, observe_rewards
from .normalization_state import make_state, restore_states
from .rewarded import RewardedBatch


@dataclass(frozen=True)
class UsedNormalization:
    """What a logged step compares others with. ``name`` in ``METHODS``, None for a user's function; ``baseline_size``:
    rewards in a sequence's baseline, its own among them, 0 where there is none; ``function_weights`` of the reward
    functions; ``by_function``: each of them is normalised by itself."""

    name: str | None
    baseline_size: int
    function_weights: list[float]
    by_function: bool = False


class Normalizer:
    """``args``: the trainer's options. What a callback changes of TRL's is followed (``follow``)."""

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
        """Applies the settings that a callback changed, as TRL does, or warns that they have no effect."""
        before, self.now = self.now, now
        if now == before:
            return
        if now.options != before.options:
            changed = [one.name for one in fields(now.options)
                       if getattr(now.options, one.name) != getattr(before.options, one.name)]  # fmt: skip
            self.run.say_once(
                f"{', '.join(changed)}: changed while training, which has no effect: these options are read when the "
                "trainer is built."
            )
        if now.scale_rewards != before.scale_rewards and not self.follows_trl:
            self.run.say_once(
                f"scale_rewards={now.scale_rewards!r}, set while training, has no effect: normalization="
                f"{self.method!r} was given, and stays."
            )
        if self.follows_trl:
            self.method = trl_method(now.scale_rewards, now.aggregation)
        if number_of_states(now.n_functions, now.aggregation) != len(self.states):
            self._make_states()

    def used(self, weights_F: torch.Tensor) -> UsedNormalization:
        """As it is now, with these weights of the reward functions."""
        by_function = self.aggregation != "sum_then_normalize"
        return UsedNormalization(self.name, self.baseline_size, weights_F.tolist(), by_function)

    @property
    def name(self) -> str | None:
        """In ``METHODS``; None for a user's function."""
        return self.method if isinstance(self.method, str) else None

    @property
    def own_group(self) -> tuple[str, Mapping[str, Any]] | None:
        """Method and options where a group's advantages depend on its own summed rewards alone, else None."""
        if self.aggregation != "sum_then_normalize" or not isinstance(self.method, str):
            return None
        return (self.method, self.options) if METHODS[self.method].own_group else None

    @property
    def baseline_size(self) -> int:
        """How many rewards are in a sequence's baseline, its own among them; 0: there is none."""
        centre = METHODS[self.method].centre if isinstance(self.method, str) else "group"
        return {"zero": 0, "given": self.run.generation_batch_size}.get(centre, self.run.num_generations)

    def __call__(self, batch: RewardedBatch, *, training: bool) -> tuple[Normalized, dict[str, float]]:
        """Advantages (P, G), and what is logged of them; only training batches are remembered by the state."""
        if training:
            observe_rewards(self.states, batch.rewards_BF, batch.weights_F, batch.num_generations, self.aggregation)
        state = self.states[0]
        if not state.ready:
            self.run.say_once(f"normalization={self.method!r} is 'std' {state.not_ready}.")
        normalized = compute_advantages(
            batch.rewards_BF,
            batch.weights_F,
            batch.num_generations,
            self.method,
            self.options,
            self.aggregation,
            self.states,
            lengths=batch.lengths_B.view(-1, batch.num_generations).to(batch.rewards_BF.dtype),
            prompt_keys=batch.keys_B[:: batch.num_generations],
        )
        metrics = normalization_metrics(
            batch.rewards_BF, batch.weights_F, batch.num_generations, self.aggregation, normalized
        )
        return normalized, {**metrics, **state.metrics()}

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """Tells every state measured curvatures of prompts of the latest batch."""
        for state in self.states:
            state.observe_curvature(prompt_id_P, curvature_P)

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each state, plain numbers for JSON."""
        return [state.state_dict() for state in self.states]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> bool:
        """False, and nothing is taken, where another normalisation saved it."""
        return restore_states(self.states, saved)
