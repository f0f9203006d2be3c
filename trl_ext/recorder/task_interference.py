"""Which tasks a logged step's prompts are of, and what is logged of how they interfere.

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

MOST = 8  # tasks whose pairs are logged; files have them all


@dataclass(frozen=True)
class Tasks:
    """``names`` in alphabetical order; ``task_P``: int64, the place of each prompt's in them, -1 for none."""

    names: list[str]
    task_P: torch.Tensor

    @classmethod
    def of(cls, sequences: SequenceTable, row_B: torch.Tensor, tasks: Mapping[int, str]) -> Tasks:
        """``row_B``: each sequence's prompt in [0, P); ``tasks``: by the prompts' keys."""
        n_prompts = int(row_B.max()) + 1 if len(row_B) else 0
        key_P = sequences.prompt_key.new_zeros(n_prompts).scatter_(0, row_B, sequences.prompt_key)
        return cls.named([tasks.get(key, "") for key in key_P.tolist()], key_P.device)

    @classmethod
    def named(cls, task_of_P: list[str], device: torch.device | str = "cpu") -> Tasks:
        """By each prompt's task, empty for none."""
        names = sorted({name for name in task_of_P if name})
        places = [names.index(name) if name else -1 for name in task_of_P]
        return cls(names, torch.tensor(places, dtype=torch.int64, device=device))

    @property
    def members(self) -> torch.Tensor:
        """(T, P) bool."""
        return self.task_P == torch.arange(len(self.names), device=self.task_P.device)[:, None]


def interference_of_tasks(groups: PromptGroups, tasks: Tasks, sketch_rmse: float) -> dict[str, float]:
    """``tasks/<a>/cos/<b>`` and ``cos_error/<b>``, each pair once; ``tasks/<a>/heard``, its share of the step's squared
    gradient. Finite values only; nothing without two tasks, or with more than ``MOST``."""
    names = tasks.names
    if not 2 <= len(names) <= MOST:
        return {}
    found = task_gradients(groups, tasks.task_P, len(names), sketch_rmse)
    metrics = {f"tasks/{name}/heard": share for name, share in zip(names, found.share_T.tolist(), strict=True)}
    for a, one in enumerate(names):
        for b in range(a + 1, len(names)):
            metrics[f"tasks/{one}/cos/{names[b]}"] = float(found.cosine_TT[a, b])
            metrics[f"tasks/{one}/cos_error/{names[b]}"] = float(found.error_TT[a, b])
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
