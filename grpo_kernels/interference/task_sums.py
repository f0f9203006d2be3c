"""Measures how the gradients of a step's tasks interfere; a task's gradient is the sum of its prompts' gradients.

Shapes: P prompts, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .step_gradients import CANCELLED, PromptGroups


@dataclass(frozen=True)
class TaskGradients:
    """The gradients G_t of a step's tasks.

    Attributes:
        cosine_TT: cosines of the tasks' gradients; NaN if a task has no gradient.
        error_TT: standard errors of the cosines, from two independent leave-one-prompt-out jackknifes and the sketch's
            error; NaN if a task has fewer than two live prompts.
        share_T: <G_t, G> / |G|^2, each task's share of the step's gradient G. The shares sum to 1 if every prompt has a
            task. A share below 0 means that the step goes against the task.
    """

    cosine_TT: torch.Tensor
    error_TT: torch.Tensor
    share_T: torch.Tensor


def task_gradients(groups: PromptGroups, task_P: torch.Tensor, n_tasks: int, sketch_rmse: float = 0.0) -> TaskGradients:
    """Computes the tasks' cosines and shares.

    Args:
        groups: the step, grouped by prompt.
        task_P: (P,) int64, each prompt's task in [0, T), -1 for none.
        n_tasks: T.
        sketch_rmse: the error of one cosine.
    """
    gram_PP = groups.gram_PP
    one_hot_PT = (task_P[:, None] == torch.arange(n_tasks, device=task_P.device)).to(gram_PP)
    towards_PT = gram_PP @ one_hot_PT  # <g_p, G_t>
    inner_TT = one_hot_PT.T @ towards_PT
    summed_T = one_hot_PT.T @ groups.trace_P
    there_T = inner_TT.diagonal() > CANCELLED * summed_T
    norm_T = torch.where(there_T, inner_TT.diagonal(), torch.nan).sqrt()
    cosine_TT = inner_TT / norm_T[:, None] / norm_T
    error_TT = torch.full_like(cosine_TT, torch.nan)
    for a in range(n_tasks):
        for b in range(a):
            variance = 0.0
            for one, other in ((a, b), (b, a)):
                members = (one_hot_PT[:, one] > 0) & groups.live_P
                left_out = inner_TT[one, other] - towards_PT[members, other]
                square = inner_TT[one, one] - 2 * towards_PT[members, one] + gram_PP.diagonal()[members]
                without = left_out / square.clamp(min=0).sqrt() / norm_T[other]
                n = len(without)
                variance += float((without - without.mean()).square().sum()) * (n - 1) / n if n > 1 else torch.nan
            error_TT[a, b] = error_TT[b, a] = (variance + sketch_rmse**2) ** 0.5
    step_square = float(gram_PP.sum())  # |G|^2
    share_T = (
        towards_PT.sum(0) / step_square if step_square > CANCELLED * float(groups.trace_P.sum()) else norm_T * torch.nan
    )
    return TaskGradients(cosine_TT, error_TT, share_T)
