"""Checks the arguments of ``GradientRecorder.rows``, and makes a micro-batch's table and its map of positions.

Shapes: S sequences of a micro-batch, R rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .sequence_table import SequenceTable

Values = torch.Tensor | Sequence[float]
SHARED = (
    "segments lists a position in several segments. The gradient at a prefix that several answers share is the sum of "
    "theirs, so no answer has a gradient of its own: give each answer its own copy of the prefix"
)


@dataclass(frozen=True)
class RowColumns:
    """One micro-batch.

    Attributes:
        table: one row per sequence; ``prompt_id`` and ``prompt_key`` are the user's group id.
        group_size: (S,) int64, the answers of the sequence's whole group; 0: those of the step. None: the table has
            the groups' numbers and rewards already.
        segment_RT: (R, T) int64, each position's sequence, -1 for none; None: row i is sequence i.
    """

    table: SequenceTable
    group_size: torch.Tensor | None
    segment_RT: torch.Tensor | None


def row_columns(
    group_ids: Values,
    rewards: Values,
    advantages: Values,
    coefficients: Values | None,
    cu_seqlens: Values | None,
    segments: torch.Tensor | None,
    group_size: int | Values | None,
) -> RowColumns:
    """Returns the micro-batch. Takes the arguments of ``GradientRecorder.rows``; raises its ``ValueError``."""
    group_S = _tensor("group_ids", group_ids)
    if group_S.ndim != 1 or group_S.is_floating_point() or group_S.dtype == torch.bool or not len(group_S):
        raise ValueError(f"group_ids must be whole numbers (S,), S > 0, not {tuple(group_S.shape)} of {group_S.dtype}")
    group_S = group_S.long()
    reward_S = _numbers("rewards", rewards, group_S)
    advantage_S = _numbers("advantages", advantages, group_S)
    size = _tensor("group_size", 0 if group_size is None else group_size).to(group_S.device)
    wrong_shape = size.ndim > 0 and size.shape != group_S.shape
    if wrong_shape or size.is_floating_point() or (group_size is not None and not (size > 0).all()):
        raise ValueError(f"group_size must be a whole number above 0, or one for each sequence, not {group_size!r}")
    size = size.long()
    table = SequenceTable(
        prompt_id=group_S,
        prompt_key=group_S,
        position=torch.zeros_like(group_S),
        length=torch.zeros_like(group_S),
        advantage=advantage_S,
        score_advantage=advantage_S,
        weight=torch.ones_like(advantage_S),
        group_rewards=reward_S[:, None],
        function_rewards=reward_S.new_zeros(len(reward_S), 0),
        square=torch.zeros_like(reward_S, dtype=torch.float64),
        coefficient=None if coefficients is None else _numbers("coefficients", coefficients, group_S),
    )
    return RowColumns(table, size.expand_as(group_S), segment_table(cu_seqlens, segments, len(group_S)))


def _tensor(name: str, values: Values | int) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be whole numbers: {error}") from None


def _numbers(name: str, values: Values, group_S: torch.Tensor) -> torch.Tensor:
    """Returns float32 values on the group ids' device. Raises ``ValueError`` unless there is a number per sequence."""
    try:
        found = torch.as_tensor(values, dtype=torch.float32).detach().to(group_S.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, one per group id: {error}") from None
    if found.shape != group_S.shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)}: expected {tuple(group_S.shape)}, one per group id")
    return found


def segment_table(cu_seqlens: Values | None, segments: torch.Tensor | None, n_segments: int) -> torch.Tensor | None:
    """Returns the segment of each position (R, T), -1 for none; None if rows aren't packed.

    Raises ``ValueError`` for a wrong ``cu_seqlens`` or ``segments``, and for a position of several segments.
    """
    if cu_seqlens is not None and segments is not None:
        raise ValueError("cu_seqlens and segments both say where the segments are: pass one of them")
    if cu_seqlens is not None:
        border = _tensor("cu_seqlens", cu_seqlens)
        length = border.diff()
        if border.is_floating_point() or border.shape != (n_segments + 1,) or border[0] != 0 or not (length > 0).all():
            raise ValueError(
                f"cu_seqlens={border.tolist()} must rise from 0 to the row's length, in {n_segments + 1} numbers for "
                f"{n_segments} group ids"
            )
        return torch.arange(n_segments, device=border.device).repeat_interleave(length.long())[None]
    if segments is None:
        return None
    if not isinstance(segments, torch.Tensor) or segments.is_floating_point() or segments.ndim not in (2, 3):
        raise ValueError("segments must be an integer tensor: (R, T), or (R, T, n) for up to n segments of a position")
    if segments.ndim == 3:
        if ((segments >= 0).sum(2) > 1).any():
            raise ValueError(SHARED)
        segments = segments.amax(2)
    if not -1 <= int(segments.min()) <= int(segments.max()) < n_segments:
        raise ValueError(f"segments must hold values in [-1, {n_segments}), as many as there are group ids")
    return segments.long()
