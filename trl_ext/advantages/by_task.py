"""Where a dataset has a column ``task``: rewards, live prompts and advantages of each task, and its name everywhere.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
from accelerate.utils import gather_object

from grpo_kernels import Normalized

from .compute import live_groups
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


Sums = dict[str, tuple[float, int]]  # by a metric's name: a sum, and of how many


class TaskMeans:
    """Means over all prompts since the last log: TRL's would be the mean of its batches' means, and one batch may hold
    a single prompt of a task where another holds twenty."""

    def __init__(self) -> None:
        self._sums: Sums = {}

    def into(self, logged: MutableMapping[str, list[float]], sums: Sums) -> None:
        """``logged``: TRL's lists of values by name, which it empties when it logs; ours hold one value each."""
        for name, (total, count) in sums.items():
            before = self._sums.get(name, (0.0, 0)) if logged.get(name) else (0.0, 0)
            self._sums[name] = total, count = before[0] + total, before[1] + count
            logged[name] = [total / count]


def task_sums(rewarded: RewardedBatch, normalized: Normalized, names: Mapping[int, str]) -> Sums:
    """Under ``tasks/<task>/``: ``reward``, whose mean is the accuracy where 1 is right and 0 wrong; ``live_share``, of
    its prompts those whose answers' rewards differ; ``advantage_abs_mean``; ``batch_share``, of the batch's prompts,
    also where it has none of a task. Empty where the column has more than ``MOST`` names."""
    key_P = rewarded.task_keys_B.view(-1, rewarded.num_generations)[:, 0]
    present = [key for key in key_P.unique().tolist() if key in names]
    if not present or len(names) > MOST:
        return {}
    reward_PG, advantage_PG = rewarded.rewards, normalized.advantages.view(-1, rewarded.num_generations)
    live_P = live_groups(reward_PG)
    sums: Sums = {}
    for key, task in names.items():
        of_P = key_P == key
        rewards = reward_PG[of_P]
        values: dict[str, torch.Tensor] = {
            "reward": rewards[~rewards.isnan()], "live_share": live_P[of_P], "batch_share": of_P,
            "advantage_abs_mean": advantage_PG[of_P].abs(),
        }  # fmt: skip
        for name, one in values.items():
            if one.numel():
                sums[f"tasks/{task}/{name}"] = float(one.double().sum()), one.numel()
    return sums
