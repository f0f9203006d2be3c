"""Gathers the rewards of a generation batch, with lengths, prompts and tasks, from all ranks.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all ranks, F reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .compute import weighted_rewards
from .prompt_keys import NO_TASK, prompt_key, task_key


@dataclass(frozen=True)
class RewardedBatch:
    """The rewards of a generation batch, of all ranks. The completions of a prompt are consecutive.

    Attributes:
        rewards_BF: (B, F), NaN where unscorable.
        weights_F: (F,), the weights of the reward functions.
        lengths_B: (B,) int64, the tokens of each completion.
        keys_B: (B,) int64, the prompts' keys.
        task_keys_B: (B,) int64, the tasks' keys; ``NO_TASK`` for a prompt without a task.
        num_generations: G.
    """

    rewards_BF: torch.Tensor
    weights_F: torch.Tensor
    lengths_B: torch.Tensor
    keys_B: torch.Tensor
    task_keys_B: torch.Tensor
    num_generations: int

    @property
    def rewards(self) -> torch.Tensor:
        """The weighted sums over functions, (P, G)."""
        return weighted_rewards(self.rewards_BF, self.weights_F).view(-1, self.num_generations)


def repetition(ids: list[int], length: int = 4) -> float:
    """Returns the share of a completion's n-grams (n = ``length``) that are repeats; 0 if it has fewer tokens."""
    count = len(ids) - length + 1
    if count < 1:
        return 0.0
    return 1 - len(set(zip(*(ids[i:] for i in range(length)), strict=False))) / count


def mean_repetition(completion_ids: list[list[int]], accelerator: Any) -> float:
    """Returns the mean ``repetition`` of the completions of all ranks."""
    values = torch.tensor([repetition(ids) for ids in completion_ids], device=accelerator.device)
    return float(accelerator.gather(values).mean())


def gather_rewarded(
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    prompts: list[Any],
    completion_ids: list[list[int]],
    num_generations: int,
    accelerator: Any,
    tasks: Mapping[int, str],
) -> RewardedBatch:
    """Gathers this rank's prompts, completion lengths and tasks from all ranks, and adds them to the rewards.

    Args:
        rewards_BF: (B, F), of all ranks already.
        prompts, completion_ids: of this rank.
        tasks: task names of this rank's prompts, by prompt key.
    """
    device = rewards_BF.device
    keys = [prompt_key(prompt) for prompt in prompts]
    of_tasks = {name: task_key(name) for name in tasks.values()}
    task_keys = [of_tasks[tasks[key]] if key in tasks else NO_TASK for key in keys]
    columns = [[len(ids) for ids in completion_ids], keys, task_keys]
    gathered = accelerator.gather(torch.tensor(columns, dtype=torch.int64, device=device).T.contiguous())
    lengths_B, keys_B, task_keys_B = gathered.unbind(1)
    return RewardedBatch(rewards_BF, weights_F.to(device), lengths_B, keys_B, task_keys_B, num_generations)
