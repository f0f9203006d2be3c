"""Do the taps see what the gradient is made of? Each parameter's sum over sequences against the gradient that is there.

A tap assumes how a layer's output hangs on its weight. Where a model does otherwise (an embedding scaled afterwards, a
norm with a gate, a weight that is used without its layer's forward) the sketch would be wrong, and nothing would show.
So each parameter's contributions are also projected to a few numbers, ``V^T (sum_t d_t a_t^T) U`` with V and U of
random signs, and compared with ``V^T grad U``: ``out + in`` multiplications a token and number, not ``out * in``.

Shapes: S sequences of a micro-batch, R rows, T positions; PROBES numbers a side.

A sum can't see tokens given to the wrong sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .projections import random_signs
from .sequence_rows import SequenceRows

PROBES = 4
# of |sum_i u_i - grad| relative to sqrt(sum_i |u_i|^2), since the sum may cancel
TOLERANCE = 1e-4
HALF_TOLERANCE = 3e-2  # products of half precision
# relative to the largest of a step: of less the gradient may be rounding alone (a bias of attention's keys has none)
ROUNDING = 1e-5
HALF_ROUNDING = 1e-2


@dataclass(frozen=True)
class GradientPart:
    """Rows of a gradient from ``first_row`` on, as this process has them, and on how many processes they are."""

    rows: torch.Tensor
    first_row: int = 0
    copies: int = 1


class TapCheck:
    """What was seen of each parameter in a step, by its number: sums over sequences, and the sum of their squares.

    ``due``: the parameters that this step checks. ``word_signs``: of weights whose rows are words, what their rows are
    projected with, where it isn't ``signs``.
    """

    def __init__(self, device: torch.device, due: frozenset[int] = frozenset()) -> None:
        self._device, self.due = device, due
        self.word_signs: dict[int, torch.Tensor] = {}
        self._signs: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._sums: dict[int, torch.Tensor] = {}
        self._squares: dict[int, torch.Tensor] = {}
        self._expected: dict[int, torch.Tensor] = {}
        self._half: set[int] = set()  # whose products have half precision's digits

    def signs(self, width: int, side: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """(width, PROBES) of +-1, the same on every process; ``side`` 0 or 1. Exact in every dtype."""
        dtype = torch.float32 if like is None else like.dtype
        if (width, side, dtype) not in self._signs:
            signs = random_signs(f"check {side} {width}", width * PROBES, self._device)
            self._signs[width, side, dtype] = signs.view(width, PROBES).to(dtype)
        signs = self._signs[width, side, dtype]
        return signs if like is None else signs.to(like.device)

    def made_in_half(self, number: int) -> None:
        """The parameter's gradient is a sum of products of half precision: it is held to ``HALF_TOLERANCE``."""
        self._half.add(number)

    def outer(self, number: int, rows: SequenceRows, left: torch.Tensor, right: torch.Tensor) -> None:
        """``left`` (R, T, PROBES) is projected already; ``right`` (R, T, in) is not."""
        self._add(number, rows.outer(left, right @ self.signs(right.shape[-1], 1, right)))

    def vector(self, number: int, vector_SD: torch.Tensor) -> None:
        """Each sequence's part of the gradient of a vector."""
        self._add(number, vector_SD @ self.signs(vector_SD.shape[-1], 1, vector_SD))

    def _add(self, number: int, values_S: torch.Tensor) -> None:
        values_S = values_S.float()
        total, square = values_S.sum(0), values_S.square().sum()
        if number in self._sums:
            total, square = total + self._sums[number].to(total.device), square + self._squares[number]
        self._sums[number], self._squares[number] = total, square

    def expect(self, number: int, part: GradientPart | None, shape: Sequence[int]) -> None:
        """What the parameter's gradient, of this shape, is projected to; None counts as 0."""
        if part is None or not part.rows.numel():
            return
        rows = part.rows.detach().float()
        here = slice(part.first_row, part.first_row + len(rows))
        signs = self.signs(shape[-1], 1, rows)
        probe = rows @ (signs if rows.ndim == 2 else signs[here])
        if rows.ndim == 2:
            left = self.word_signs.get(number)
            left = self.signs(shape[0], 0, rows) if left is None else left
            probe = left[here].to(probe).T @ probe
        self._expected[number] = probe.flatten() / part.copies

    def errors(
        self,
        numbers: Sequence[int],
        *,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
        processes: int = 1,
    ) -> tuple[dict[int, float], list[int]]:
        """The relative error of each parameter whose sum over sequences isn't its gradient (inf: none of it was seen),
        and those that were found right.

        Of a parameter without a gradient nothing can be said (LoRA's A at B = 0, an idle expert): it is in neither.

        Args:
            numbers: of parameters whose gradients were expected, the mean over ``processes``; on every process the
                same parameters, of each gradient a part.
            reduce: the sum over processes of a tensor.
        """
        if not numbers:
            return {}, []
        size = PROBES * PROBES
        both = torch.zeros(len(numbers), 2 * size + 2, device=self._device)
        expected, seen = both[:, :size], both[:, size:-1]
        for place, number in enumerate(numbers):
            if number in self._expected:
                flat = self._expected[number]
                expected[place, : flat.numel()] = flat
            if number in self._sums:
                flat = self._sums[number].flatten()
                seen[place, : flat.numel()] = flat
                seen[place, -1] = self._squares[number]
            both[place, -1] = float(number in self._half)
        both = reduce(both)
        expected, seen, half = both[:, :size], both[:, size:-1], both[:, -1] > 0
        distance = (seen[:, :-1] / processes - expected).norm(dim=1)
        relative = distance / (seen[:, -1].sqrt() / processes)
        size_of = expected.norm(dim=1)
        finite = size_of.isfinite() & seen.isfinite().all(dim=1)  # not where a GradScaler's step overflows
        largest = torch.where(finite, size_of, 0.0).max()
        known = finite & (size_of > torch.where(half.any(), HALF_ROUNDING, ROUNDING) * largest)
        bound = torch.where(half, HALF_TOLERANCE, TOLERANCE)
        table = torch.stack([torch.where(known, relative, -1.0), bound]).T.tolist()
        found = {number: pair for number, pair in zip(numbers, table, strict=True) if pair[0] != -1.0}
        wrong = {number: error for number, (error, most) in found.items() if not error <= most}
        return wrong, [number for number in found if number not in wrong]
