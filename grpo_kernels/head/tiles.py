"""Splits the rows of a call into tiles of logits, and into windows whose gradients are multiplied at once.

Shapes: H hidden, V vocabulary. A row is a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

Range = tuple[int, int]  # first row, last row + 1

# A tile has all columns of the vocabulary and as many rows as fit. More rows make products more efficient and need
# fewer passes over dL/dW. Measured on two cores (1024 tokens, H 576, V 49152; time relative to 1024 rows; medians):
#   rows                     64    128    256    512
#   fp32 trainable         1.38   1.13   1.06   1.02
#   fp32 frozen            1.51   1.24   1.10   1.00
#   bf16 trainable         2.11   1.56   1.24   1.07
#   bf16 frozen            1.47   1.22   1.06   1.01
# 150 MiB are 256 rows of the largest vocabularies in float32. The peak memory is then below a third of TRL's.
TILE_BYTES = {"cpu": 150 << 20, "cuda": 1200 << 20}
MAX_TILE_ROWS = {"cpu": 512, "cuda": 4096}
# Half-precision dL/dlogits that are kept for one product dL/dW: 8224 rows of V = 151936. With a tile at most 3.5 GiB.
# On a CPU a tile is in the operands' dtype, so larger tiles would do the same without a second buffer.
KEPT_BYTES = {"cpu": 0, "cuda": 2384 << 20}
# Kernels are compiled for the alignment of their pointers, so that every range starts at a multiple of 16 rows.
UNIT = 16


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a call.

    Attributes:
        windows: the tiles of each window, as ranges of the rows with a gradient. Gradients of a window's rows take part
            in one product each for dL/dhidden and dL/dW.
        rest: the tiles without a gradient, as ranges that start at 0.
        keeps: whether a window has several tiles, so that their gradients are kept in a buffer of its own. If not, a
            window is a tile, and its gradients replace its logits.
    """

    windows: list[list[Range]]
    rest: list[Range]
    keeps: bool

    @property
    def tile_rows(self) -> int:
        """The rows of the largest tile."""
        tiles = [*self.rest, *(tile for window in self.windows for tile in window)]
        return max((end - begin for begin, end in tiles), default=0)

    @property
    def kept_rows(self) -> int:
        """The rows of the largest window whose gradients are kept."""
        return max((window[-1][1] - window[0][0] for window in self.windows), default=0) if self.keeps else 0


def split(count: int, most: int, start: int = 0) -> Iterator[Range]:
    """Yields as few ranges of at most ``most`` rows as possible, nearly equal, at multiples of 16 from ``start`` on.

    513 rows of at most 512 are 256 and 257. Sizes differ by less than 32. ``most`` must be a multiple of 16.
    """
    units, number = -(-count // UNIT), -(-count // most)
    edges = [start + min(count, units * i // number * UNIT) for i in range(number + 1)] if number else []
    yield from pairwise(edges)


def padded(n_vocabulary: int) -> int:
    """Returns the columns of a row in memory.

    Each row starts at a multiple of 16 elements, so that kernels can read 16 bytes at a time for every V.
    """
    return -(-n_vocabulary // UNIT) * UNIT


def most_tile_rows(n_vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Returns the rows of a tile of at most ``TILE_BYTES``: a multiple of 16 in [16, 512], or [16, 4096] on a GPU."""
    kind = _kind(device)
    rows = TILE_BYTES[kind] // (padded(n_vocabulary) * itemsize)
    return max(UNIT, min(MAX_TILE_ROWS[kind], rows // UNIT * UNIT))


def most_kept_rows(hidden_size: int, n_vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Returns how many rows' gradients may be kept: a multiple of 16, at most 2 H and ``KEPT_BYTES``.

    In half precision, 2 H rows take the memory of one float32 dL/dW, which more than one product would need.
    """
    return min(2 * hidden_size, KEPT_BYTES[_kind(device)] // (padded(n_vocabulary) * itemsize)) // UNIT * UNIT


def plan_tiles(n_rows: int, n_live: int, most_tile: int, most_kept: int) -> TilePlan:
    """Splits ``n_rows`` rows into tiles. The first ``n_live`` rows have a gradient.

    ``most_tile`` and ``most_kept``: the most rows of a tile, and of a window whose gradients are kept.
    """
    keeps = n_live > most_tile and most_kept > most_tile
    windows = split(n_live, most_kept if keeps else most_tile)
    tiles = [list(split(end - begin, most_tile, begin)) for begin, end in windows]
    return TilePlan(tiles, list(split(n_rows - n_live, most_tile)), keeps)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"
