"""Finds the groups of a step over all ranks: which answers belong together, and whether the step holds all of them.

Shapes: B sequences of this rank, A of all ranks, P groups, G the most answers of a group in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .collectives import Collectives
from .measure import real_rows
from .sequence_table import SequenceTable


@dataclass(frozen=True)
class StepGroups:
    """The groups of a step, the same on every rank.

    Attributes:
        key_P: (P,) int64, the users' group ids in ascending order.
        reward_PG: (P, G) rewards, NaN where unscorable, missing, or of a partial group.
        partial_P: (P,) bool: the step lacks answers of the group, or has some twice.
    """

    key_P: torch.Tensor
    reward_PG: torch.Tensor
    partial_P: torch.Tensor


def number_groups(
    table: SequenceTable, group_size_B: torch.Tensor, counts: Sequence[int], collectives: Collectives
) -> tuple[SequenceTable, StepGroups]:
    """Numbers the groups from 0 and each group's answers in the order of ranks and rows. A collective.

    A partial group's rewards become NaN, which leaves it out of the statistics of groups.

    Args:
        table: this rank's sequences, as ``row_columns`` makes them.
        group_size_B: (B,) the answers of the whole group; 0: those of the step.
        counts: each rank's number of sequences.
        collectives: the ranks' collectives.
    """
    reward_B = table.group_rewards[:, 0]
    packed_BN = torch.stack([table.prompt_id, group_size_B, reward_B.double().view(torch.int64)], dim=1)
    missing = max(counts) - len(packed_BN)
    packed_AN = collectives.gather(torch.cat([packed_BN, packed_BN.new_zeros(missing, 3)]))
    packed_AN = packed_AN[real_rows(counts, packed_AN.device)]
    reward_A = packed_AN[:, 2].contiguous().view(torch.float64).float()
    key_P, row_A, count_P = packed_AN[:, 0].unique(return_inverse=True, return_counts=True)
    size_P = torch.zeros_like(count_P).scatter_reduce_(0, row_A, packed_AN[:, 1], "amax")
    partial_P = (size_P > 0) & (count_P != size_P)
    order_A = row_A.argsort(stable=True)
    place_A = torch.empty_like(row_A)
    place_A[order_A] = torch.arange(len(row_A), device=row_A.device) - (count_P.cumsum(0) - count_P)[row_A[order_A]]
    reward_PG = reward_A.new_full((len(key_P), int(count_P.max())), torch.nan)
    reward_PG[row_A, place_A] = torch.where(partial_P[row_A], torch.nan, reward_A)
    here = slice(sum(counts[: collectives.rank]), sum(counts[: collectives.rank + 1]))
    row_B, place_B = (x[here].to(table.prompt_id.device) for x in (row_A, place_A))
    group_rewards = reward_PG.to(reward_B.device)[row_B]
    return replace(table, prompt_id=row_B, position=place_B, group_rewards=group_rewards), StepGroups(
        key_P, reward_PG, partial_P
    )
