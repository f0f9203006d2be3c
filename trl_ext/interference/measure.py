"""What this process recorded of a logged step -> exchanges over processes -> inner products, metrics, what-if.

Sketches aren't gathered: every process gets the same few columns of all of them (``Together.columns``), and whatever
is logged is a sum over columns (``grpo_kernels/interference/inner_products.py``). A process moves what it recorded,
whatever their number. Only up to ``MOST_DENSE`` sequences is the matrix of all inner products made.

Shapes: B sequences of this process's or of all processes' step, P prompts, H hidden, K numbers of a sketch in M parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.interference.curvature import directional_curvature
from grpo_kernels.interference.inner_products import PIECE, ColumnProducts, InnerProducts, PromptProducts, sum_rows
from grpo_kernels.interference.metrics import interference_metrics, orthogonality
from grpo_kernels.interference.model_parts import part_metrics
from grpo_kernels.interference.sketch_error import rmse_of_parts
from grpo_kernels.interference.step_gradients import PromptGroups, StepGradients, group_by_prompt
from trl_ext.trl_surface import RunSettings

from .sequences import Known, unpack_known
from .task_interference import Tasks, interference_of_tasks
from .together import Together

MOST_DENSE = 1024  # sequences of which all inner products are kept: 8 MB


@dataclass
class Recorded:
    """Of this process. ``sketch_BMN`` float32, as the mean over processes takes it;
    ``sections`` of its last dimension; ``packed_BN`` (``sequences.pack_known``); ``features_PH`` (P, H + 1): sums over
    the sequences of each prompt id, and their number, 0 where there are none; or None."""

    sketch_BMN: torch.Tensor
    sections: dict[str, slice]
    packed_BN: torch.Tensor
    features_PH: torch.Tensor | None
    n_functions: int
    summed: bool  # only sums over prompts are wanted

    def shape(self) -> list[int]:
        """What has to be the same on all processes: rows, numbers of a row, of what is known, of a feature."""
        hidden = 0 if self.features_PH is None else self.features_PH.shape[1]
        return [*self.sketch_BMN.flatten(1).shape, self.packed_BN.shape[1], hidden, int(self.summed)]

    def forget_sketch(self) -> None:
        """All of it but its shape, to have its memory back."""
        self.sketch_BMN = self.sketch_BMN.new_empty(0, *self.sketch_BMN.shape[1:])

    def sizes(self) -> list[int]:
        """What is to be as large as the largest of all processes': prompts with features, prompts."""
        prompts = len(self.packed_BN[:, 0].unique()) if self.summed else 0
        seen = 0 if self.features_PH is None else int((self.features_PH[:, -1] > 0).sum())
        return [seen, prompts]


def only_prompts_matter(coefficient_B: torch.Tensor | None, n_sequences: int) -> bool:
    """Whether sketches are summed by prompt before they are sent: nothing is logged of single sequences then."""
    return coefficient_B is None and n_sequences > MOST_DENSE


@dataclass(frozen=True)
class Measured:
    """Of all processes, the same on each. ``scores``: inner products of the sequences, what was scored beside the step
    too; ``step`` without. ``grams_PP``: by part of the model, where asked for."""

    known: Known
    step: StepGradients
    groups: PromptGroups
    scores: torch.Tensor | InnerProducts
    grams_PP: dict[str, torch.Tensor]
    metrics: dict[str, float]
    orthogonality: float | None
    curvature: tuple[torch.Tensor, torch.Tensor]


def measure(
    recorded: Recorded,
    largest: list[int],
    together: Together,
    run: RunSettings,
    baseline_size: int,
    what_if: Callable[[torch.Tensor | InnerProducts, Known, Tasks], dict[str, float]],
    *,
    tasks: Mapping[int, str],
) -> Measured:
    """A collective call. ``largest``: of all processes' ``sizes``. ``what_if``: more metrics, of sequences. ``tasks``:
    by the prompts' keys, of those that have one."""
    packed_BN = together.gather(recorded.packed_BN)
    order_B = None
    if len(packed_BN) > MOST_DENSE:  # sums over prompts that come one after the other are faster
        order_B = (packed_BN[:, 0] * run.num_generations + packed_BN[:, 2]).argsort()
        packed_BN = packed_BN[order_B]
    known = unpack_known(packed_BN, run.num_generations, recorded.n_functions)
    prompt_P, row_B = known.prompt_id.unique(return_inverse=True)
    scores: torch.Tensor | InnerProducts
    if recorded.summed:
        columns, row_U = _of_prompts(recorded, prompt_P, largest[1], together)
        grams_PP, error, errors = _by_part(columns, row_U, len(prompt_P), recorded)
        scores = PromptProducts(sum(grams_PP.values()), row_B, known.square)  # type: ignore[arg-type]
        step_products: torch.Tensor | InnerProducts = scores
    else:
        columns = _of_sequences(recorded, known, order_B, together)
        scores = columns.matrix() if len(known.prompt_id) <= MOST_DENSE else columns
        step_products = scores
        beside_B = known.beside
        if beside_B.any():
            columns = columns.masked(beside_B)
            step_products = columns
            if isinstance(scores, torch.Tensor):
                step_products = scores.masked_fill(beside_B | beside_B[:, None], 0.0)
        grams_PP, error, errors = _by_part(columns, row_B, len(prompt_P), recorded)
    coefficient_B = known.coefficient
    step = StepGradients(
        gram_BB=step_products,
        prompt_B=known.prompt_id,
        reward_B=known.reward,
        coefficient_B=None if coefficient_B is None else coefficient_B.masked_fill(known.beside, 0.0),
        baseline_size=baseline_size,
    )
    groups = group_by_prompt(step)
    features_PP = _features(recorded, prompt_P, largest[0], together)
    metrics = interference_metrics(groups, sketch_rmse=error, features_PP=features_PP)
    if run.options.interference_parts:
        metrics |= part_metrics(grams_PP, errors)
    of_tasks = Tasks.of(known, row_B, tasks)
    metrics |= interference_of_tasks(groups, of_tasks, error)
    return Measured(
        known=known,
        step=step,
        groups=groups,
        scores=scores,
        grams_PP=grams_PP if run.options.interference_parts else {},
        metrics=metrics | what_if(scores, known, of_tasks),
        orthogonality=orthogonality(groups, error),
        curvature=directional_curvature(groups),
    )


def _of_sequences(recorded: Recorded, known: Known, order_B: torch.Tensor | None, together: Together) -> ColumnProducts:
    values_BK, first = together.columns(recorded.sketch_BMN.flatten(1))
    recorded.forget_sketch()
    if order_B is not None:
        for piece_Bk in values_BK.split(max(1, PIECE // (4 * len(values_BK))), dim=1):
            piece_Bk.copy_(piece_Bk[order_B])
    return ColumnProducts(values_BK, known.square, together.sum, first=first)


def _of_prompts(
    recorded: Recorded, prompt_P: torch.Tensor, most: int, together: Together
) -> tuple[ColumnProducts, torch.Tensor]:
    """Of each process's sums over its prompts; and their rows in ``prompt_P``."""
    own_P, row_B = recorded.packed_BN[:, 0].unique(return_inverse=True)
    sums_PK = sum_rows(recorded.sketch_BMN.flatten(1), row_B, len(own_P))
    recorded.forget_sketch()
    return _sums_by_columns(sums_PK, own_P, prompt_P, most, together)


def _sums_by_columns(
    sums_PK: torch.Tensor, own_P: torch.Tensor, prompt_P: torch.Tensor, most: int, together: Together
) -> tuple[ColumnProducts, torch.Tensor]:
    """Of each process's sums over its prompts ``own_P``, of which no process has more than ``most``."""
    missing = most - len(own_P)  # rows of 0 belong anywhere
    ids_U = together.gather(torch.cat([own_P, prompt_P[:1].expand(missing)]))
    values_UK, first = together.columns(torch.nn.functional.pad(sums_PK, (0, 0, 0, missing)))
    nothing_U = values_UK.new_zeros(len(values_UK), dtype=torch.float64)
    return ColumnProducts(values_UK, nothing_U, together.sum, first=first), torch.searchsorted(prompt_P, ids_U)


def _by_part(
    columns: ColumnProducts, row_B: torch.Tensor, n_prompts: int, recorded: Recorded
) -> tuple[dict[str, torch.Tensor], float, dict[str, float]]:
    """(P, P) inner products of the prompts' gradients in each part of the model; the error of a cosine in the whole,
    and in each."""
    _, n_parts, width = recorded.sketch_BMN.shape
    starts = [part * width for part in range(n_parts)]
    grams_PP: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    whole_MPP: Any = 0.0
    for name, section in recorded.sections.items():
        blocks = [slice(start + section.start, start + section.stop) for start in starts]
        made_MPP = columns.of_blocks(row_B, n_prompts, blocks)
        grams_PP[name] = made_MPP.sum(0)
        errors[name] = rmse_of_parts(made_MPP)
        whole_MPP = whole_MPP + made_MPP
    return grams_PP, rmse_of_parts(whole_MPP), errors


def _features(recorded: Recorded, prompt_P: torch.Tensor, most: int, together: Together) -> torch.Tensor | None:
    """(P, P) inner products of the means over each prompt's sequences, of those that have one that ran; None: none."""
    totals_PH, recorded.features_PH = recorded.features_PH, None
    if totals_PH is None or most == 0:
        return None
    own_P = (totals_PH[:, -1] > 0).nonzero()[:, 0]
    columns, row_U = _sums_by_columns(totals_PH[own_P, :-1], own_P, prompt_P, most, together)
    count_P = totals_PH.new_zeros(len(prompt_P))
    count_P[torch.searchsorted(prompt_P, own_P)] = totals_PH[own_P, -1]
    count_P = together.sum(count_P)
    hidden = slice(0, totals_PH.shape[1] - 1)
    gram_PP = columns.of_blocks(row_U, len(prompt_P), [hidden])[0]
    ran_P = count_P > 0
    return (gram_PP / count_P[:, None] / count_P)[ran_P][:, ran_P]
