"""The compared trainers. Each counts the tokens that it generates and trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from examples.dead_groups.selection import PassRates, mixed_chance, task_numbers, weighted_draw
from examples.dead_groups.settings import Rewards, pass_rates
from examples.tasks.questions import Question
from trl_ext import CurvatureGRPOTrainer

ORACLE_EVERY = 6  # steps between two looks at the pass rates

ARMS: dict[str, dict[str, Any]] = {  # options of the trainer
    "std": {"normalization": "std"},
    "none": {"normalization": "none"},
    "resample": {"normalization": "std", "resample_zero_variance": True},
    "choose": {"normalization": "std"},
    "oracle": {"normalization": "std"},
}


class CountingTrainer(CurvatureGRPOTrainer):
    """``generated`` and ``trained``: tokens of answers; ``live`` and ``true_live``: groups of the latest round with
    different rewards, and with different right rewards; ``groups``, in all rounds."""

    scorer: Rewards
    generated = trained = groups = live_groups = true_live_groups = 0

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, ids)
        if self.model.training:
            self.generated += sum(map(len, ids))
            rewards_PG = rewards_BF[:, 0].view(-1, self.num_generations)
            true_PG = torch.tensor(self.scorer.true).view(-1, self.num_generations)
            self.groups += len(rewards_PG)
            self.live_groups += int((rewards_PG.amax(1) != rewards_PG.amin(1)).sum())
            self.true_live_groups += int((true_PG.amax(1) != true_PG.amin(1)).sum())
            self.observe(rewards_PG)
        return rewards_BF

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        training = self.model.training
        batch = super()._generate_and_score_completions(self.chosen(inputs) if training else inputs)
        if training:
            self.trained += int(batch["completion_mask"][batch["advantages"] != 0].sum())
        return batch

    def chosen(self, inputs: Any) -> Any:
        """Returns the rows to answer."""
        return inputs

    def observe(self, rewards_PG: torch.Tensor) -> None:
        """Takes the rewards of a round."""


class ChoosingTrainer(CountingTrainer):
    """Answers prompts that probably have answers of different rewards. ``expected``: their number, summed."""

    rows: Sequence[int] = ()
    expected = 0.0

    def begin(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.known = PassRates(task_numbers(self.train_dataset["task"]), self.num_generations)

    def chosen(self, inputs: Any) -> Any:
        count = len(inputs) // self.num_generations
        rows, expected = self.draw(count)
        self.rows, self.expected = rows.tolist(), self.expected + count * expected
        return [dict(self.train_dataset[row]) for row in self.rows for _ in range(self.num_generations)]

    def draw(self, count: int) -> tuple[np.ndarray, float]:
        return self.known.choose(count, self.state.global_step, self.random)

    def observe(self, rewards_PG: torch.Tensor) -> None:
        for row, right in zip(self.rows, rewards_PG.sum(1).tolist(), strict=True):
            self.known.observe(row, right, self.state.global_step)


class OracleTrainer(ChoosingTrainer):
    """The same, but it knows the present policy's pass rates, at no cost."""

    questions: Sequence[Question] = ()

    def draw(self, count: int) -> tuple[np.ndarray, float]:
        if self.state.global_step % ORACLE_EVERY == 0:
            rates = pass_rates(self.model, self.processing_class, self.questions).double().clamp(0, 1).numpy()
            self.chances = mixed_chance(rates, self.num_generations)
        rows = weighted_draw(self.chances + 1e-9, count, self.random)
        return rows, float(self.chances[rows].mean())

    def observe(self, rewards_PG: torch.Tensor) -> None:
        pass
