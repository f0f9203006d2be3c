"""Exchanges what each rank recorded of a logged step, and computes inner products, metrics and what-if.

Sketches aren't gathered. Each rank gets some columns of all sketches (``Collectives.columns``), and every metric is a
sum over columns (``grpo_kernels/interference/inner_products.py``), so a rank's traffic doesn't grow with the number of
ranks. The full Gram matrix is computed for at most ``MAX_DENSE`` sequences.

Shapes: B sequences of the step on this rank or on all ranks, P prompts, H hidden, K numbers of a sketch in M
replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from grpo_kernels.interference.alignment import StepMoments, step_alignment
from grpo_kernels.interference.curvature import directional_curvature
from grpo_kernels.interference.inner_products import PIECE, ColumnProducts, InnerProducts
from grpo_kernels.interference.metrics import interference_metrics, orthogonality
from grpo_kernels.interference.model_parts import part_metrics
from grpo_kernels.interference.sketch_error import rmse_of_parts
from grpo_kernels.interference.step_gradients import PromptGroups, StepGradients, group_by_prompt

from .collectives import Collectives, OtherRankFailedError
from .sequence_table import SequenceTable
from .tasks import Tasks, interference_of_tasks

MAX_DENSE = 1024  # sequences whose Gram matrix is kept: 8 MB

Products = torch.Tensor | InnerProducts


@dataclass
class RecordedStep:
    """What this rank recorded of a step.

    Attributes:
        sketch_BMN: (B, M, N) float32, divided by the number of ranks like DDP's gradients.
        sections: by part of the model, its slice of the last dimension.
        sequences: the sequences of its rows.
        features_PH: (P, H + 1) the sum of the features of each prompt id's sequences, and their number; None: no
            features.
    """

    sketch_BMN: torch.Tensor
    sections: dict[str, slice]
    sequences: SequenceTable
    features_PH: torch.Tensor | None

    def pad(self, count: int) -> None:
        """Appends zeros up to ``count`` sequences, which ``gather`` needs on every rank."""
        if count > len(self.sequences):
            zeros = self.sketch_BMN.new_zeros(count - len(self.sequences), *self.sketch_BMN.shape[1:])
            self.sketch_BMN, self.sequences = torch.cat([self.sketch_BMN, zeros]), self.sequences.padded(count)

    def forget_sketch(self) -> None:
        """Frees the sketch, and keeps its shape."""
        self.sketch_BMN = self.sketch_BMN.new_empty(0, *self.sketch_BMN.shape[1:])


def check_shapes(recorded: RecordedStep, collectives: Collectives) -> list[int]:
    """Returns each rank's number of sequences. A collective.

    Raises ``OtherRankFailedError`` on all ranks if another dimension differs, or no rank has a sequence.
    """
    sequences, features_PH = recorded.sequences, recorded.features_PH
    hidden = 0 if features_PH is None else features_PH.shape[1]
    widths = [sequences.group_rewards.shape[1], sequences.function_rewards.shape[1], hidden]
    shape = torch.tensor([[*recorded.sketch_BMN.shape, *widths]], device=collectives.device)
    shapes = collectives.gather(shape)
    if not (shapes[:, 1:] == shapes[0, 1:]).all() or not shapes[:, 0].any():
        raise OtherRankFailedError
    return shapes[:, 0].tolist()


@dataclass(frozen=True)
class StepProducts:
    """Inner products of all ranks' sequences.

    Attributes:
        scores: of all sequences, those of the extra pass included.
        step: with the extra pass's sequences set to 0.
        grams_PP: by part of the model, the prompts' inner products.
        rmse: the sketch's error of one cosine; ``rmse_by_part``: in each part of the model.
    """

    scores: Products
    step: Products
    grams_PP: dict[str, torch.Tensor]
    rmse: float
    rmse_by_part: dict[str, float]


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step, the same on every rank.

    Attributes:
        alignment: what ``step_alignment`` returns.
        curvature: prompts (P,) and their directional curvatures (P,).
    """

    sequences: SequenceTable
    step: StepGradients
    groups: PromptGroups
    products: StepProducts
    metrics: dict[str, float]
    orthogonality: float | None
    alignment: tuple[str, StepMoments | None]
    curvature: tuple[torch.Tensor, torch.Tensor]


def measure(
    recorded: RecordedStep,
    collectives: Collectives,
    counts: Sequence[int],
    baseline_size: int,
    what_if: Callable[[Products, SequenceTable, Tasks], dict[str, float]],
    *,
    tasks: Mapping[int, str],
    by_part: bool = False,
) -> MeasuredStep:
    """Measures a step. A collective.

    Args:
        recorded: this rank's step, whose sketch it frees.
        collectives: the ranks' collectives.
        counts: each rank's number of sequences, from ``check_shapes``.
        baseline_size: as in ``StepGradients``.
        what_if: returns the metrics of the comparison with other normalisations.
        tasks: the prompts' tasks, by prompt key.
        by_part: whether to return metrics of each part of the model.
    """
    recorded.pad(max(counts))
    packed_BN = collectives.gather(recorded.sequences.pack())
    order_B = None if min(counts) == max(counts) else real_rows(counts, packed_BN.device)
    if sum(counts) > MAX_DENSE:  # sums over prompts are faster if each prompt's sequences are adjacent
        kept_BN = packed_BN if order_B is None else packed_BN[order_B]
        n_answers = recorded.sequences.group_rewards.shape[1]
        sorted_B = (kept_BN[:, 0] * n_answers + kept_BN[:, 2]).argsort()
        order_B = sorted_B if order_B is None else order_B[sorted_B]
    packed_BN = packed_BN if order_B is None else packed_BN[order_B]
    sequences = recorded.sequences.unpack(packed_BN)
    prompt_P, row_B = sequences.prompt_id.unique(return_inverse=True)
    products = _products(recorded, sequences, order_B, row_B, len(prompt_P), collectives)
    coefficient_B = sequences.coefficient
    step = StepGradients(
        gram_BB=products.step,
        prompt_B=sequences.prompt_id,
        reward_B=sequences.reward,
        coefficient_B=None if coefficient_B is None else coefficient_B.masked_fill(sequences.extra, 0.0),
        baseline_size=baseline_size,
    )
    groups = group_by_prompt(step)
    features_PP = _features(recorded.features_PH, prompt_P, collectives)
    metrics = interference_metrics(groups, sketch_rmse=products.rmse, features_PP=features_PP)
    if by_part:
        metrics |= part_metrics(products.grams_PP, products.rmse_by_part)
    of_tasks = Tasks.of(sequences, row_B, tasks)
    metrics |= interference_of_tasks(groups, of_tasks, products.rmse)
    metrics |= what_if(products.scores, sequences, of_tasks)
    return MeasuredStep(
        sequences,
        step,
        groups,
        products,
        metrics,
        orthogonality(groups, products.rmse),
        step_alignment(groups, sequences.advantage),
        directional_curvature(groups),
    )


def real_rows(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns the indices of the sequences among the gathered rows, which are padded to equal numbers."""
    most = max(counts)
    return torch.cat([torch.arange(count, device=device) + rank * most for rank, count in enumerate(counts)])


def _products(
    recorded: RecordedStep,
    sequences: SequenceTable,
    order_B: torch.Tensor | None,
    row_B: torch.Tensor,
    n_prompts: int,
    collectives: Collectives,
) -> StepProducts:
    values_BK, first = collectives.columns(recorded.sketch_BMN.flatten(1))
    recorded.forget_sketch()
    if order_B is not None and len(order_B) < len(values_BK):
        values_BK = values_BK[order_B]
    elif order_B is not None:  # in place, to save memory
        for piece_Bk in values_BK.split(max(1, PIECE // (4 * len(values_BK))), dim=1):
            piece_Bk.copy_(piece_Bk[order_B])
    columns = ColumnProducts(values_BK, sequences.square, collectives.sum, first=first)
    scores = columns.matrix() if len(sequences) <= MAX_DENSE else columns
    of_step: Products = scores
    extra_B = sequences.extra
    if extra_B.any():
        of_step = columns = columns.masked(extra_B)
        if isinstance(scores, torch.Tensor):
            of_step = scores.masked_fill(extra_B | extra_B[:, None], 0.0)
    return StepProducts(scores, of_step, *_by_part(columns, row_B, n_prompts, recorded))


def _by_part(
    columns: ColumnProducts, row_B: torch.Tensor, n_prompts: int, recorded: RecordedStep
) -> tuple[dict[str, torch.Tensor], float, dict[str, float]]:
    """Returns the prompts' inner products by part of the model, the error of a cosine, and that error by part."""
    _, n_replicates, width = recorded.sketch_BMN.shape
    grams_MPP: dict[str, torch.Tensor] = {}
    for name, section in recorded.sections.items():
        starts = [replicate * width for replicate in range(n_replicates)]
        blocks = [slice(start + section.start, start + section.stop) for start in starts]
        grams_MPP[name] = columns.of_blocks(row_B, n_prompts, blocks)
    total_MPP = sum(grams_MPP.values(), torch.zeros(()))
    errors = {name: rmse_of_parts(gram_MPP) for name, gram_MPP in grams_MPP.items()}
    return {name: gram_MPP.sum(0) for name, gram_MPP in grams_MPP.items()}, rmse_of_parts(total_MPP), errors


def _features(
    features_PH: torch.Tensor | None, prompt_P: torch.Tensor, collectives: Collectives
) -> torch.Tensor | None:
    """Returns the inner products of the prompts' mean features, for prompts with a sequence that ran; None: none."""
    if features_PH is None:
        return None
    here_P = prompt_P < len(features_PH)
    totals_PH = features_PH.new_zeros(len(prompt_P), features_PH.shape[1])
    totals_PH[here_P] = features_PH[prompt_P[here_P]]
    totals_PH = collectives.sum(totals_PH)
    ran_P = totals_PH[:, -1] > 0
    if not ran_P.any():
        return None
    total_PH, count_P = totals_PH[ran_P, :-1], totals_PH[ran_P, -1]
    width = -(-total_PH.shape[1] // collectives.processes)  # each rank multiplies its share of the columns
    own_PK = total_PH[:, width * collectives.rank :][:, :width].double()
    gram_PP = collectives.sum((own_PK @ own_PK.T).float()).double()
    return gram_PP / count_P[:, None] / count_P
