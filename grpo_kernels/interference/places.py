"""Draws where a layer's folded gradient lies in the entries of the sketch, and adds it there.

Shapes: L layers of one shape, S sequences, M replicates, o and i the widths of a layer's two folded sides.

Entry j of a side goes to ``offset + (j + shift) % width``. The offset is random so that small layers rarely overlap
(LoRA of rank 8 on the built-in policy: RMSE of a cosine 0.011 instead of 0.019). The shift is random so that features
that are large in every layer don't all land on one index (without it, LoRA of rank 16 on the built-in architecture has
an RMSE of 0.021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """The place of one side of a layer in the entries, or of a vector in the slots of a replicate.

    Attributes:
        width: the number of entries of the side; a vector's is the number of slots, which it may exceed.
        shift, offset: see above.
        length: how many numbers the layer has there.
        stride: the distance of two neighbours in the flattened entries.
    """

    width: int
    shift: int
    offset: int
    length: int
    stride: int = 1

    def runs(self) -> list[tuple[slice, slice]]:
        """Returns the slices (of the side, of the entries) that are contiguous in both, for a side."""
        first, rest = self.width - self.shift, self.offset + self.shift
        whole = [(slice(0, first), slice(rest, self.offset + self.width))]
        return whole + ([(slice(first, self.width), slice(self.offset, rest))] if self.shift else [])


def index_tables(places: Sequence[Place], device: torch.device) -> list[torch.Tensor]:
    """Returns for each place the (length,) int64 indices of its numbers in the flattened entries, made in one go."""
    if not places:
        return []
    lengths = [place.length for place in places]
    rows = [(p.width, p.shift, p.offset, p.stride, p.length) for p in places]
    table = torch.tensor(rows).to(device)
    first = table[:, -1].cumsum(0) - table[:, -1]
    of_each = torch.cat([table, first[:, None]], dim=1).repeat_interleave(table[:, 4], dim=0, output_size=sum(lengths))
    width, shift, offset, stride, _, first = of_each.unbind(1)
    number = torch.arange(sum(lengths), device=device) - first
    return list((((number + shift) % width + offset) * stride).split(lengths))


def add_by_slices(entries: torch.Tensor, sums: torch.Tensor, places: Sequence[Sequence[Place]]) -> None:
    """Adds (L, M, S, o, i) to the entries (M, S, side, side) layer by layer; on a CPU, 0.15 ns for each number."""
    for layer, (out, inner) in zip(sums, places, strict=True):
        for out_from, out_to in out.runs():
            for in_from, in_to in inner.runs():
                entries[..., out_to, in_to].add_(layer[..., out_from, in_from])


def add_at_once(entries: torch.Tensor, sums: torch.Tensor, out_LO: torch.Tensor, in_LI: torch.Tensor) -> None:
    """Adds like ``add_by_slices``, in three launches for all layers; on a CPU that takes 1 to 8 ns for each number."""
    index = (out_LO[:, :, None] + in_LI[:, None]).flatten().expand(*entries.shape[:2], -1)
    entries.flatten(2).scatter_add_(2, index, sums.permute(1, 2, 0, 3, 4).flatten(2))
