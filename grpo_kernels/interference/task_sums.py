"""How the gradients of a step's tasks interfere, and whose is heard: a task's gradient is the sum of its prompts'.

Shapes: P prompts, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .step_gradients import CANCELLED, PromptGroups


@dataclass(frozen=True)
class TaskGradients:
    """``cosine_TT``: of the tasks' gradients; ``error_TT``: its standard error by leaving out one prompt at a time (two
    independent jackknifes), the sketch's error with it; NaN where a task has no gradient, an error where one has a
    single live prompt. ``share_T``: <G_t, G> / |G|^2 of the step's gradient G, who is heard; they sum to 1 where every
    prompt has a task, and one below 0 is gone against. ``live_T``: live prompts."""

    cosine_TT: torch.Tensor
    error_TT: torch.Tensor
    share_T: torch.Tensor
    live_T: torch.Tensor


def task_gradients(groups: PromptGroups, task_P: torch.Tensor, n_tasks: int, sketch_rmse: float = 0.0) -> TaskGradients:
    """``task_P``: int64 in [0, T), -1 for a prompt of none; ``ValueError`` for others. ``sketch_rmse``: error of one
    cosine."""
    gram_PP = groups.gram_PP
    if tuple(task_P.shape) != (len(gram_PP),) or task_P.dtype != torch.int64:
        raise ValueError(f"task_P is {task_P.dtype} {tuple(task_P.shape)}: expected int64 ({len(gram_PP)},)")
    if len(task_P) and not -1 <= int(task_P.min()) <= int(task_P.max()) < n_tasks:
        raise ValueError(f"task_P holds {int(task_P.min())} to {int(task_P.max())}: expected -1 to {n_tasks - 1}")
    one_hot_PT = (task_P[:, None] == torch.arange(n_tasks, device=task_P.device)).to(gram_PP)
    towards_PT = gram_PP @ one_hot_PT  # <g_p, G_t>
    inner_TT = one_hot_PT.T @ towards_PT
    summed_T = one_hot_PT.T @ groups.trace_P
    there_T = inner_TT.diagonal() > CANCELLED * summed_T
    live_T = (one_hot_PT * groups.live_P[:, None]).sum(0)
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
    whole = float(gram_PP.sum())
    share_T = towards_PT.sum(0) / whole if whole > CANCELLED * float(groups.trace_P.sum()) else norm_T * torch.nan
    return TaskGradients(cosine_TT, error_TT, share_T, live_T)
