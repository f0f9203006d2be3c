"""Checks that each parameter's recorded sum over sequences equals its gradient.

A tap assumes how a layer's output depends on its weight. If a model violates that (an embedding that is scaled later, a
norm with a gate, a weight that is used without its layer's forward), the sketch is wrong without an error. So the check
projects each parameter's sum to a few numbers, ``V^T (sum_t d_t a_t^T) U`` with random signs V and U, and compares them
with ``V^T grad U``. That takes ``out + in`` multiplications per token and number instead of ``out * in``.

The check can't detect tokens that are assigned to the wrong sequence, because the sum stays the same.

Shapes: S sequences of a micro-batch, R rows, T positions; PROBES numbers per side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .projections import random_signs
from .sequence_rows import SequenceRows

PROBES = 4
# limits of |sum_i u_i - grad| / sqrt(sum_i |u_i|^2); not relative to the sum, which may cancel
TOLERANCE = 1e-4
HALF_TOLERANCE = 3e-2  # for products in half precision
# A gradient smaller than this share of the step's largest may be rounding only (that of a bias of attention keys is),
# and isn't checked.
ROUNDING = 1e-5
HALF_ROUNDING = 1e-2


SignsKey = tuple[int, int, torch.dtype]  # width, side, dtype


@dataclass(frozen=True)
class GradientShard:
    """This rank's rows of a gradient.

    Attributes:
        rows: the gradient, or a shard of it.
        first_row: the index of the shard's first row.
        copies: the number of ranks that hold these rows.
    """

    rows: torch.Tensor
    first_row: int = 0
    copies: int = 1


def _row(total_LK: torch.Tensor, square_L: torch.Tensor) -> torch.Tensor:
    """Returns (L, PROBES * PROBES + 1): the sums, zeros, and the sum of squares."""
    zeros = (0, PROBES * PROBES - total_LK.shape[1])
    return torch.cat([torch.nn.functional.pad(total_LK, zeros), square_L[:, None]], dim=1)


class TapCheck:
    """The projected sums over sequences of each checked parameter in one step, and the sums of their squares.

    Attributes:
        due: the numbers of the parameters that this step checks.
        word_signs: by parameter, the matrix that projects its rows in place of ``signs``, if its rows are words.

    Args:
        signs: the signs of earlier steps, which are the same in all of them; this step adds its own.
    """

    def __init__(
        self, device: torch.device, due: frozenset[int] = frozenset(), signs: dict[SignsKey, torch.Tensor] | None = None
    ) -> None:
        self._device, self.due = device, due
        self.word_signs: dict[int, torch.Tensor] = {}
        self._signs: dict[SignsKey, torch.Tensor] = {} if signs is None else signs
        self._recorded: list[tuple[list[int], torch.Tensor]] = []
        self._expected: dict[int, torch.Tensor] = {}
        self._half: set[int] = set()  # parameters whose products have half precision

    def signs(self, width: int, side: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """Returns (width, PROBES) signs for side 0 or 1, the same on every rank and exact in every dtype."""
        dtype = torch.float32 if like is None else like.dtype
        if (width, side, dtype) not in self._signs:
            signs = random_signs(f"check {side} {width}", width * PROBES, self._device)
            self._signs[width, side, dtype] = signs.view(width, PROBES).to(dtype)
        signs = self._signs[width, side, dtype]
        return signs if like is None else signs.to(like.device)

    def mark_half_precision(self, number: int) -> None:
        """Applies ``HALF_TOLERANCE`` to the parameter: its gradient is a sum of products in half precision."""
        self._half.add(number)

    def outer(
        self, numbers: Sequence[int], rows: SequenceRows, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]
    ) -> None:
        """Adds the gradients of L weights. ``left``, (R, T, PROBES) each, is projected, ``right`` (R, T, in) isn't."""
        probed = torch.stack([one @ self.signs(one.shape[-1], 1, one) for one in right])
        self._add(numbers, rows.outer(torch.stack(list(left)), probed))

    def vector(self, numbers: Sequence[int], vectors_LSD: torch.Tensor) -> None:
        """Adds each sequence's gradients (L, S, D) of L vectors."""
        self._add(numbers, vectors_LSD @ self.signs(vectors_LSD.shape[-1], 1, vectors_LSD))

    def _add(self, numbers: Sequence[int], values_LS: torch.Tensor) -> None:
        """Keeps the sums over sequences of L parameters' numbers (L, S, ...), and the sums of their squares."""
        values_LSK = values_LS.float().flatten(2)
        square_L = values_LSK.square().sum((1, 2))
        self._recorded.append((list(numbers), _row(values_LSK.sum(1), square_L)))

    def expect(self, number: int, part: GradientShard | None, shape: Sequence[int]) -> None:
        """Stores the projection of the parameter's gradient, whose full shape is ``shape``; None counts as 0."""
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
        self._expected[number] = probe.flatten() if part.copies == 1 else probe.flatten() / part.copies

    def errors(
        self,
        numbers: Sequence[int],
        *,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
        processes: int = 1,
    ) -> tuple[dict[int, float], list[int]]:
        """Compares sums with gradients. All ranks must call it with the same ``numbers``.

        Args:
            numbers: the parameters to compare, for which ``expect`` stored the gradient averaged over ranks.
            reduce: returns the sum of a tensor over ranks.
            processes: the number of ranks.

        Returns:
            The relative error of each parameter whose sum isn't its gradient (inf if nothing was recorded), and the
            parameters that passed. A parameter without a gradient (LoRA's A at B = 0, an idle expert) is in neither.
        """
        if not numbers:
            return {}, []
        size = PROBES * PROBES
        both = torch.zeros(len(numbers) + 1, 2 * size + 2, device=self._device)  # the last is of unasked numbers
        expected, recorded = both[:, :size], both[:, size:-1]
        place = {number: place for place, number in enumerate(numbers)}
        for length in {flat.numel() for flat in self._expected.values()}:
            flats = {n: flat for n, flat in self._expected.items() if n in place and flat.numel() == length}
            if flats:
                here = torch.tensor([place[number] for number in flats], device=self._device)
                expected[here, :length] = torch.stack([flat.to(self._device) for flat in flats.values()])
        if self._recorded:
            indices = [place.get(number, len(numbers)) for part, _ in self._recorded for number in part]
            values = torch.cat([values.to(self._device) for _, values in self._recorded])
            recorded.index_add_(0, torch.tensor(indices, device=self._device), values)
        both = both[:-1].contiguous()
        both[:, -1] = torch.tensor([float(number in self._half) for number in numbers], device=self._device)
        both = reduce(both)
        expected, recorded, half = both[:, :size], both[:, size:-1], both[:, -1] > 0
        distance = (recorded[:, :-1] / processes - expected).norm(dim=1)
        relative = distance / (recorded[:, -1].sqrt() / processes)
        size_of = expected.norm(dim=1)
        finite = size_of.isfinite() & recorded.isfinite().all(dim=1)  # a GradScaler's step may overflow
        largest = torch.where(finite, size_of, 0.0).max()
        known = finite & (size_of > torch.where(half.any(), HALF_ROUNDING, ROUNDING) * largest)
        bound = torch.where(half, HALF_TOLERANCE, TOLERANCE)
        table = torch.stack([torch.where(known, relative, -1.0), bound]).T.tolist()
        found = {number: pair for number, pair in zip(numbers, table, strict=True) if pair[0] != -1.0}
        wrong = {number: error for number, (error, most) in found.items() if not error <= most}
        return wrong, [number for number in found if number not in wrong]
