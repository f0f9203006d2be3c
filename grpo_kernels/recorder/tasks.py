"""Assigns a logged step's prompts to tasks, and computes the metrics of how the tasks interfere.

Shapes: B sequences, P prompts in ascending order of their ids, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from grpo_kernels.interference.step_gradients import PromptGroups
from grpo_kernels.interference.task_sums import task_gradients

from .sequence_table import SequenceTable

MAX_TASKS = 8  # with more tasks, their pairs aren't logged; files keep them


@dataclass(frozen=True)
class Tasks:
    """The tasks of a step's prompts.

    Attributes:
        names: in alphabetical order.
        task_P: (P,) int64, each prompt's index into ``names``, -1 for none.
    """

    names: list[str]
    task_P: torch.Tensor

    @classmethod
    def of(cls, sequences: SequenceTable, row_B: torch.Tensor, tasks: Mapping[int, str]) -> Tasks:
        """Assigns tasks to prompts.

        Args:
            row_B: (B,) each sequence's prompt in [0, P).
            tasks: the prompts' tasks, by prompt key.
        """
        n_prompts = int(row_B.max()) + 1 if len(row_B) else 0
        key_P = sequences.prompt_key.new_zeros(n_prompts).scatter_(0, row_B, sequences.prompt_key)
        return cls.named([tasks.get(key, "") for key in key_P.tolist()], key_P.device)

    @classmethod
    def named(cls, task_of_P: list[str], device: torch.device | str = "cpu") -> Tasks:
        """Makes ``Tasks`` from each prompt's task, an empty string for none."""
        names = sorted({name for name in task_of_P if name})
        places = [names.index(name) if name else -1 for name in task_of_P]
        return cls(names, torch.tensor(places, dtype=torch.int64, device=device))

    @property
    def members(self) -> torch.Tensor:
        """(T, P) bool: which prompts a task has."""
        return self.task_P == torch.arange(len(self.names), device=self.task_P.device)[:, None]


def interference_of_tasks(groups: PromptGroups, tasks: Tasks, sketch_rmse: float) -> dict[str, float]:
    """Returns the finite metrics of the tasks; none with fewer than two tasks, or more than ``MAX_TASKS``.

    * ``tasks/<a>/cos/<b>``, ``tasks/<a>/cos_error/<b>``: cosine of two tasks' gradients and its error, once per pair.
    * ``tasks/<a>/heard``: the task's share of the step's squared gradient.
    """
    names = tasks.names
    if not 2 <= len(names) <= MAX_TASKS:
        return {}
    found = task_gradients(groups, tasks.task_P, len(names), sketch_rmse)
    metrics = {f"tasks/{name}/heard": share for name, share in zip(names, found.share_T.tolist(), strict=True)}
    for a, one in enumerate(names):
        for b in range(a + 1, len(names)):
            metrics[f"tasks/{one}/cos/{names[b]}"] = float(found.cosine_TT[a, b])
            metrics[f"tasks/{one}/cos_error/{names[b]}"] = float(found.error_TT[a, b])
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
