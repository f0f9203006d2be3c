"""Where a dataset has a column ``task``: rewards, live prompts and advantages of each task, and its name everywhere.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object

from grpo_kernels import Normalized

from .prompt_keys import NO_TASK, task_key
from .rewarded import RewardedBatch

MOST = 16  # tasks that are logged by name; a column with more says something else


class TaskNames:
    """Names by key, the same on every process: they are exchanged when a key appears that isn't known yet."""

    def __init__(self, processes: int, say_once: Callable[[str], None]) -> None:
        self.processes, self._say_once = processes, say_once
        self.names: dict[int, str] = {}

    def learn(self, keys_B: torch.Tensor, own: Mapping[int, str]) -> None:
        """``keys_B``: of all processes; ``own``: task of this process's prompts, by the prompts' keys."""
        if set(keys_B.unique().tolist()) <= {NO_TASK, *self.names}:
            return
        found = {task_key(name): name for name in own.values()}
        for part in gather_object([found]) if self.processes > 1 else [found]:
            self.names.update(part)
        if len(self.names) > MOST:
            self._say_once(
                f"The dataset's column 'task' has more than {MOST} names: rewards aren't logged by task, nor how tasks "
                "interfere; files keep the names."
            )

    def of_prompts(self, rewarded: RewardedBatch) -> dict[int, str]:
        """By the prompt's key, of the prompts of all processes that have one."""
        keys = zip(rewarded.keys_B.tolist(), rewarded.task_keys_B.tolist(), strict=True)
        return {prompt: self.names[task] for prompt, task in keys if task in self.names}


def task_metrics(rewarded: RewardedBatch, normalized: Normalized, names: Mapping[int, str]) -> dict[str, float]:
    """Under ``tasks/<task>/``: ``reward``, the mean (with 1 for right and 0 for wrong the accuracy); ``live_share``, of
    its prompts those whose answers' rewards differ; ``advantage_abs_mean``; ``batch_share``, of the batch's prompts.
    None where the column has more than ``MOST`` names."""
    key_P = rewarded.task_keys_B.view(-1, rewarded.num_generations)[:, 0]
    present = [key for key in key_P.unique().tolist() if key in names]
    if not present or len(names) > MOST:
        return {}
    reward_PG, advantage_PG = rewarded.rewards, normalized.advantages.view(-1, rewarded.num_generations)
    filled_PG = reward_PG.nan_to_num(-torch.inf).amax(1), reward_PG.nan_to_num(torch.inf).amin(1)
    live_P = filled_PG[0] > filled_PG[1]
    metrics: dict[str, float] = {}
    for key in present:
        of_P = key_P == key
        rewards = reward_PG[of_P]
        scorable = rewards[~rewards.isnan()]
        values: dict[str, Any] = {
            "live_share": live_P[of_P].double().mean(), "batch_share": of_P.double().mean(),
            "advantage_abs_mean": advantage_PG[of_P].abs().mean(),
        }  # fmt: skip
        if len(scorable):
            values["reward"] = scorable.mean()
        metrics |= {f"tasks/{names[key]}/{name}": float(value) for name, value in values.items()}
    return metrics
