"""Projects a layer's gradient G (out, in) to k * k numbers, so that inner products are kept in expectation.

Shapes: S sequences, R rows, T tokens of a row, M replicates (1 of a side that isn't folded yet), k the sketch's width.

A sketch consists of ``REPLICATES`` independent sketches of the same gradient; their disagreement measures the error
(``sketch_error.py``). Each replicate is made in two linear steps:

1. Each side of ``G = sum_t d_t a_t^T`` is folded to ``SIDE`` * k by a count sketch (Charikar et al. 2002): every entry
   gets a random sign, and entries with the same target index are added. A side that is narrower than that isn't folded.
   The folded layers, (side, side) per sequence, are added up.
2. The entries of that sum get signs, which differ between replicates, and are folded to the replicate's numbers.

The signs of different layers are independent, so the layers' inner products with each other are 0 in expectation.

Why not ``R_out^T G R_in`` with R of width k: G has few directions (tokens, heads, LoRA's rank), and each one's length
then has a relative error of 1/sqrt(k) per side, not 1/k. RMSE of the prompts' cosines on the built-in policy at k = 64
(8 prompts x 8 answers, 20 draws): 0.031 with random signs in R, 0.028 with orthogonal columns, 0.018 folded to 4k in
one replicate; with LoRA (r = 8) 0.040, 0.037 and 0.011.

Why two replicates: on other rollouts of the same policy one replicate of 4k had an RMSE of 0.0202 (LoRA 0.0150), two of
3k 0.0196 (0.0138), four of 2k 0.0204 (0.0155), with about the same number of multiplications. Four replicates fold
twice as often, and predict one step's error to 10 % instead of 20 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .layer_taps import Layer
from .sequence_rows import SequenceRows

REPLICATES = 2
SIDE = 3  # a side is folded to this multiple of k
VOCABULARY = 1  # the vocabulary's side is projected to this multiple of k per replicate, in the fused head
# Bytes of a side that are folded at once. On a CPU a piece should fit into the caches (two replicates of 2400 x 1536 to
# 192, two threads: 3.2 ms at 512 KiB, 2.3 at 1 MiB, 1.9 at 2, 1.8 at 4, 1.9 at 8); on a GPU launches should be few.
TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


def random_signs(seed: str, count: int, device: torch.device) -> torch.Tensor:
    """Returns (count,) int8 random signs, +1 or -1, which are the same on every device.

    They are a hash of seed and index in integer arithmetic: two rounds of a 32-bit mixer (hash-prospector's
    16-21f0aaad-15-735a2d97-15), whose products stay below 2^63. Each word gives 32 signs.
    """
    keys = random.Random(seed)
    word_N = torch.arange(math.ceil(count / 32), device=device)
    for _ in range(2):
        word_N ^= keys.getrandbits(32)
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            word_N ^= word_N >> shift
            word_N *= factor
            word_N &= 0xFFFFFFFF
        word_N ^= word_N >> 15
    bits_NW = word_N.to(torch.int32)[:, None] >> torch.arange(32, dtype=torch.int32, device=device)
    return bits_NW.to(torch.int8).bitwise_and_(1).mul_(2).sub_(1).flatten()[:count]


def _fold_by_halves(values_ND: torch.Tensor, signs_P1D: torch.Tensor, shift: int, out_PNK: torch.Tensor) -> None:
    """Folds (N, D) to (M, N, K) with D > K: adds signed entry i to index (i + shift) mod K.

    It adds the upper half of the blocks of K entries to the lower half until one block is left. On a CPU that takes a
    fifth (D = 1536) to a half (D = 576) less time than one sum over all blocks.
    """
    width, side = values_ND.shape[1], out_PNK.shape[-1]
    blocks = math.ceil(math.ceil(width / side) / 2)
    half = blocks * side
    sums = out_PNK.new_empty(len(signs_P1D), len(values_ND), half)
    torch.mul(values_ND[:, :half], signs_P1D[..., :half], out=sums)
    sums[..., : width - half].addcmul_(values_ND[:, half:], signs_P1D[..., half:])
    while blocks > 1:
        upper, blocks = blocks, math.ceil(blocks / 2)
        sums[..., : (upper - blocks) * side].add_(sums[..., blocks * side : upper * side])
    out_PNK[..., shift:], out_PNK[..., :shift] = sums[..., : side - shift], sums[..., side - shift : side]


def _fold_in_few_launches(values_ND: torch.Tensor, signs_P1D: torch.Tensor, shift: int, out_PNK: torch.Tensor) -> None:
    """Folds like ``_fold_by_halves``, by one sum over all blocks."""
    width, side = values_ND.shape[1], out_PNK.shape[-1]
    blocks = math.ceil((shift + width) / side)
    signed = values_ND.new_empty(len(signs_P1D), len(values_ND), blocks * side)
    signed[..., :shift], signed[..., shift + width :] = 0, 0
    torch.mul(values_ND, signs_P1D, out=signed[..., shift : shift + width])
    torch.sum(signed.unflatten(-1, (blocks, side)), dim=2, dtype=out_PNK.dtype, out=out_PNK)


class IdentityProjection:
    """Keeps exact gradients, with the interface of ``Projections``. For small models and tests."""

    replicates = 1

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self._shapes = shapes

    def outer(self, rows: SequenceRows, layer: Layer, left: torch.Tensor, right: torch.Tensor) -> None:
        rows.add(layer.weight, rows.outer(left, right))

    def words(self, rows: SequenceRows, layer: Layer, ids: torch.Tensor, n_words: int, right: torch.Tensor) -> None:
        self.outer(rows, layer, torch.nn.functional.one_hot(ids, n_words).to(right.dtype), right)

    def projected_words(self, rows: SequenceRows, layer: Layer, projected: torch.Tensor, right: torch.Tensor) -> None:
        self.outer(rows, layer, projected, right)

    def vector(self, rows: SequenceRows, layer: Layer, number: int, vector_SD: torch.Tensor) -> None:
        rows.add(number, vector_SD)

    def vocabulary(self, n_words: int, weight: int, dtype: torch.dtype) -> None:
        return None

    def finish(self, rows: SequenceRows) -> None:
        pass

    def keys(self, sections: Sequence[str], section_of: Mapping[int, str]) -> list[tuple[Any, str]]:
        return [(number, name) for name in sections for number in sorted(section_of) if section_of[number] == name]

    def size(self, key: Any) -> int:
        return self._shapes[key].numel()


class Projections:
    """The random projections of one step; the same seed gives the same ones on every rank and device.

    Args:
        dim: k.
        seed: the seed of the signs.
        device: the device of the signs.
        shapes: the parameters' shapes, by number.
    """

    replicates = REPLICATES

    def __init__(self, dim: int, seed: int, device: torch.device, shapes: Sequence[Sequence[int]]) -> None:
        self.dim, self.device = dim, device
        self.side = SIDE * dim
        self.slots = max(1, dim**2 // REPLICATES)  # numbers of a replicate
        self._seed = seed
        # drawn for all layers at once: on a GPU, drawing layer by layer took longer than folding
        self._sizes = [REPLICATES * size for shape in shapes for size in shape]
        self._first = [0]
        for shape in shapes:
            self._first.append(self._first[-1] + len(shape))
        self._of_features = random_signs(f"{seed} features", sum(self._sizes), device).float().split(self._sizes)
        self._kept: dict[str, torch.Tensor] = {}

    def _features(self, parameter: int, axis: int) -> torch.Tensor:
        """Returns the (M, size) signs of the features of this axis."""
        return self._of_features[self._first[parameter] + axis].view(REPLICATES, -1)

    def _large(self, name: str, count: int) -> torch.Tensor:
        """Returns (count,) int8 signs, and keeps them for the step."""
        if name not in self._kept:
            self._kept[name] = random_signs(f"{self._seed} {name}", count, self.device)
        return self._kept[name]

    def fold_side(self, values_RTD: torch.Tensor, side: str, layer: int) -> torch.Tensor:
        """Folds (R, T, width) to (M, R, T, side), at least float32.

        A narrower side is returned unchanged, (1, R, T, width): its signs and shift cost less on the sequences' sums
        (``turn_narrow``). The result is rotated by a random shift, so that features that are large in every layer
        don't all land on one index (without it, LoRA of rank 16 on the built-in architecture has an RMSE of 0.021).
        """
        n_rows, n_tokens, width = values_RTD.shape
        if width < self.side:
            return values_RTD[None]
        signs_PD, shift = self._turn(side, layer, width)
        signs_PD = signs_PD.to(values_RTD.device)
        dtype = torch.promote_types(values_RTD.dtype, torch.float32)
        if width == self.side:
            return (values_RTD.to(dtype) * signs_PD[:, None, None]).roll(shift, -1)
        values_ND = values_RTD.reshape(-1, width)
        folded = values_ND.new_empty(REPLICATES, len(values_ND), self.side, dtype=dtype)
        device = "cpu" if values_ND.device.type == "cpu" else "cuda"
        step = max(1, TILE_BYTES[device] // (width * values_ND.element_size()))
        fold = _fold_by_halves if device == "cpu" else _fold_in_few_launches
        for start in range(0, len(values_ND), step):
            fold(values_ND[start : start + step], signs_PD[:, None], shift, folded[:, start : start + step])
        return folded.view(REPLICATES, n_rows, n_tokens, self.side)

    def turn_narrow(self, sums: torch.Tensor, layer: int, sides: Sequence[str] = ("out", "in")) -> torch.Tensor:
        """Applies signs and shift to those sides of (M or 1, S, out, in) sums that ``fold_side`` left unchanged.

        Each replicate has signs of its own. With the same signs, the inner products of different layers would be the
        same in both, and the predicted error of a cosine 4 to 9 % too low.
        """
        for side, axis in (("out", -2), ("in", -1)):
            if side in sides and sums.shape[axis] < self.side:
                signs_PD, shift = self._turn(side, layer, sums.shape[axis])
                signs_P1D = signs_PD[:, None].to(sums)
                sums = (sums * (signs_P1D[..., None] if side == "out" else signs_P1D[:, :, None])).roll(shift, axis)
        return sums

    def _turn(self, side: str, layer: int, width: int) -> tuple[torch.Tensor, int]:
        """Returns the (M, width) signs of a side, and its shift."""
        shift = self._draw(f"shift {side} {layer}").randrange(min(width, self.side))
        return self._features(layer, ["out", "in"].index(side)), shift

    def _draw(self, name: str) -> random.Random:
        """Returns a random stream for one purpose, so that results don't depend on the order of the layers."""
        return random.Random(f"{self._seed} {name}")

    def place(self, layer: int, rows: int, columns: int) -> tuple[slice, slice]:
        """Returns the random block of the (side, side) entries to which a folded layer is added.

        It is random so that small layers rarely overlap (LoRA of rank 8 on the built-in policy: RMSE of a cosine 0.011
        instead of 0.019).
        """
        draw = self._draw(f"place {layer}")
        row, column = draw.randint(0, self.side - rows), draw.randint(0, self.side - columns)
        return slice(row, row + rows), slice(column, column + columns)

    def fold_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Folds (M, S, side, side), the sum of all layers, to (S, M, slots).

        Rows are padded to an odd width. With a width of 192, a column of LoRA's narrow blocks would use only 32 of 2048
        slots.
        """
        signs = self._large("entries", REPLICATES * self.side**2).to(entries.device, entries.dtype)
        signed = entries * signs.view(REPLICATES, 1, self.side, self.side)
        padded = torch.nn.functional.pad(signed, (0, 1 - self.side % 2))
        return self._wrap(padded.flatten(2).transpose(0, 1))

    def fold_vector(self, vector_SD: torch.Tensor, layer: int) -> torch.Tensor:
        """Folds (S, width) to (S, M, slots)."""
        wrapped = self._wrap(vector_SD[:, None] * self._features(layer, 0).to(vector_SD.device, vector_SD.dtype))
        return wrapped.roll(self._draw(f"place {layer}").randrange(self.slots), dims=2)

    def _wrap(self, values: torch.Tensor) -> torch.Tensor:
        """Folds (S, M, any) to (S, M, slots), by adding blocks of ``slots`` numbers."""
        padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % self.slots))
        return padded.unflatten(-1, (-1, self.slots)).sum(2) / REPLICATES**0.5

    def vocabulary(self, n_words: int, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the (V, M * width) matrix of +-1/sqrt(width) that projects dL/dlogits.

        It is a dense product, because the fused head has dL/dlogits only tile by tile. ``split_vocabulary`` splits the
        result.
        """
        return self._words(n_words, layer).to(dtype) / (VOCABULARY * self.dim) ** 0.5

    def of_words(self, ids: torch.Tensor, n_words: int, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the rows of ``vocabulary`` of these words, (..., M * width)."""
        return self._words(n_words, layer)[ids].to(dtype) / (VOCABULARY * self.dim) ** 0.5

    def _words(self, n_words: int, layer: int) -> torch.Tensor:
        width = REPLICATES * VOCABULARY * self.dim
        return self._large(f"vocabulary {layer}", n_words * width).view(n_words, width)

    @staticmethod
    def split_vocabulary(projected: torch.Tensor) -> torch.Tensor:
        """Splits a product with ``vocabulary``, (R, T, M * width), to (M, R, T, width)."""
        return projected.unflatten(-1, (REPLICATES, -1)).movedim(-2, 0)

    # ---- adding a layer's gradient; ``left`` and ``right`` (R, T, width) belong to the two sides of its weight

    def outer(self, rows: SequenceRows, layer: Layer, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds each sequence's ``sum_t left_t right_t^T`` to the rows' sums."""
        assert layer.weight is not None
        if layer.kind == "head":
            projected = left @ self.vocabulary(left.shape[-1], layer.weight, left.dtype)
            self.projected_words(rows, layer, projected, right)
        else:
            self._add_folded(rows, layer, self.fold_side(left, "out", layer.weight), right, ("out", "in"))

    def words(self, rows: SequenceRows, layer: Layer, ids: torch.Tensor, n_words: int, right: torch.Tensor) -> None:
        """Adds the same for a ``left`` of one-hot vectors of these words."""
        assert layer.weight is not None
        self.projected_words(rows, layer, self.of_words(ids, n_words, layer.weight, right.dtype), right)

    def projected_words(self, rows: SequenceRows, layer: Layer, projected: torch.Tensor, right: torch.Tensor) -> None:
        """Adds the same for a ``left`` that is multiplied by ``vocabulary`` already."""
        self._add_folded(rows, layer, self.split_vocabulary(projected), right, ("in",))

    def _add_folded(
        self, rows: SequenceRows, layer: Layer, left: torch.Tensor, right: torch.Tensor, turned: Sequence[str]
    ) -> None:
        """Adds a ``left`` that is folded already. ``turned``: the sides that get their signs after the sum."""
        assert layer.weight is not None
        weight = layer.weight
        right = self.fold_side(right, "in", weight)
        place = self.place(weight, left.shape[-1], right.shape[-1])

        def turn(sums: torch.Tensor) -> torch.Tensor:
            return self.turn_narrow(sums, weight, turned)

        rows.add_outer(layer.section, left, right, self.side, place, turn)

    def vector(self, rows: SequenceRows, layer: Layer, number: int, vector_SD: torch.Tensor) -> None:
        """Adds each sequence's gradient (S, D) of the vector that is parameter ``number``."""
        rows.add(layer.section, self.fold_vector(vector_SD, number))

    def finish(self, rows: SequenceRows) -> None:
        """Folds the rows' entries to their sketch."""
        for section, entries in rows.entries.items():
            rows.add(section, self.fold_entries(entries))
        rows.entries.clear()

    def keys(self, sections: Sequence[str], section_of: Mapping[int, str]) -> list[tuple[Any, str]]:
        """Returns the keys of ``SequenceRows.total`` and the section of each, the same on every rank."""
        return [(name, name) for name in sections]

    def size(self, key: Any) -> int:
        """Returns how many numbers a sequence has under this key."""
        return REPLICATES * self.slots

    def numbers(self) -> int:
        """Returns how many signs are kept in memory."""
        return sum(self._sizes) + sum(signs.numel() for signs in self._kept.values())
