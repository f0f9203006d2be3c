"""The gathered rewards of a batch become advantages by the method that the options ask for, with its state.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all processes, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grpo_kernels import METHODS, Normalized
from trl_ext.trl_surface import RunSettings

from .advantages import compute_advantages, normalization_metrics, number_of_states, observe_rewards
from .normalization_state import make_state, restore_states
from .rewarded import RewardedBatch


class Normalizer:
    """``method`` and ``options`` as ``resolve_normalization`` gives them."""

    def __init__(
        self,
        run: RunSettings,
        method: str | Callable[..., torch.Tensor],
        options: Mapping[str, Any],
        n_functions: int,
    ) -> None:
        self.run, self.method, self.options, self.aggregation = run, method, options, run.aggregation
        self.states = [make_state(method, options) for _ in range(number_of_states(n_functions, run.aggregation))]

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
