"""Logs rewards, live prompts and advantages of each task, if the dataset has a column ``task``.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
from accelerate.utils import gather_object

from grpo_kernels import Normalized

from .compute import live_groups
from .prompt_keys import NO_TASK, task_key
from .rewarded import RewardedBatch

MOST = 16  # tasks that are logged by name; a column with more values probably doesn't name tasks


class TaskNames:
    """The names of the tasks by key, the same on every rank. Ranks exchange names when an unknown key appears."""

    def __init__(self, processes: int, log_once: Callable[[str], None]) -> None:
        self.processes, self._log_once = processes, log_once
        self.names: dict[int, str] = {}

    def learn(self, keys_B: torch.Tensor, own: Mapping[int, str]) -> None:
        """Adds the names of new tasks. All ranks must call it together.

        Args:
            keys_B: (B,) the task keys of all ranks' sequences.
            own: the task names of this rank's prompts, by prompt key.
        """
        if set(keys_B.unique().tolist()) <= {NO_TASK, *self.names}:
            return
        found = {task_key(name): name for name in own.values()}
        for part in gather_object([found]) if self.processes > 1 else [found]:
            self.names.update(part)
        if len(self.names) > MOST:
            self._log_once(
                f"The dataset's column 'task' has more than {MOST} names: rewards aren't logged by task, nor how tasks "
                "interfere; files keep the names."
            )

    def of_prompts(self, rewarded: RewardedBatch) -> dict[int, str]:
        """Returns the task names by prompt key, for the prompts of all ranks that have a task."""
        keys = zip(rewarded.keys_B.tolist(), rewarded.task_keys_B.tolist(), strict=True)
        return {prompt: self.names[task] for prompt, task in keys if task in self.names}


Sums = dict[str, tuple[float, int]]  # by name of the metric: a sum, and the number of values in it


class TaskMeans:
    """Computes means over all prompts since the last log.

    TRL would log the mean of the batches' means, but one batch may hold one prompt of a task, and another twenty.
    """

    def __init__(self) -> None:
        self._sums: Sums = {}

    def into(self, logged: MutableMapping[str, list[float]], sums: Sums) -> None:
        """Writes the means into ``logged``, TRL's lists of values by name, which TRL empties when it logs.

        Each of our lists holds one value: the mean so far; the sum, as long as nothing was counted.
        """
        for name, (total, count) in sums.items():
            before = self._sums.get(name, (0.0, 0)) if logged.get(name) else (0.0, 0)
            self._sums[name] = total, count = before[0] + total, before[1] + count
            logged[name] = [total / max(count, 1)]


def task_sums(
    rewarded: RewardedBatch, normalized: Normalized, names: Mapping[int, str], tolerance: float = 0.0
) -> Sums:
    """Sums up the metrics of each task, under ``tasks/<task>/``; none if there are more than ``MOST`` tasks.

    * ``reward``: its mean is the accuracy if right answers get 1 and wrong ones 0.
    * ``live_share``: share of the task's prompts that are live.
    * ``advantage_abs_mean``: mean absolute advantage.
    * ``batch_share``: the task's share of the batch's prompts; 0 if the batch has none.
    """
    key_P = rewarded.task_keys_B.view(-1, rewarded.num_generations)[:, 0]
    present = [key for key in key_P.unique().tolist() if key in names]
    if not present or len(names) > MOST:
        return {}
    reward_PG, advantage_PG = rewarded.rewards, normalized.advantages.view(-1, rewarded.num_generations)
    live_P = live_groups(reward_PG, tolerance)
    sums: Sums = {}
    for key, task in names.items():
        of_task_P = key_P == key
        rewards = reward_PG[of_task_P]
        values: dict[str, torch.Tensor] = {
            "reward": rewards[~rewards.isnan()],
            "live_share": live_P[of_task_P],
            "batch_share": of_task_P,
            "advantage_abs_mean": advantage_PG[of_task_P].abs(),
        }
        for name, tensor in values.items():
            if tensor.numel():
                sums[f"tasks/{task}/{name}"] = float(tensor.double().sum()), tensor.numel()
    return sums
