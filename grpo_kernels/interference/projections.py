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
from .places import Place, add_at_once, add_by_slices, index_tables
from .sequence_rows import SequenceRows

Tensors = Sequence[torch.Tensor]  # of L layers of one shape

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


def favours_few_launches(device: torch.device) -> bool:
    """Returns whether a few large operations are faster than many that stay in a processor's cache."""
    return device.type != "cpu"


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


def _fold_in_few_launches(
    values: Sequence[torch.Tensor], signs: Sequence[torch.Tensor], shifts: Sequence[int], out_LPNK: torch.Tensor
) -> None:
    """Folds L layers (N, D) like ``_fold_by_halves``: one product for each layer, and one sum over all blocks."""
    width, side = values[0].shape[1], out_LPNK.shape[-1]
    blocks = 1 + math.ceil(width / side)  # enough for any shift
    signed = out_LPNK.new_zeros(*out_LPNK.shape[:-1], blocks * side)
    for layer, values_ND, signs_P1D, shift in zip(signed, values, signs, shifts, strict=True):
        torch.mul(values_ND, signs_P1D, out=layer[..., shift : shift + width])
    torch.sum(signed.unflatten(-1, (blocks, side)), dim=-2, out=out_LPNK)


def weights_of(layers: Sequence[Layer]) -> list[int]:
    """Returns the numbers of the layers' weights, which must be trainable."""
    numbers = [layer.weight for layer in layers if layer.weight is not None]
    assert len(numbers) == len(layers)
    return numbers


class IdentityProjection:
    """Keeps exact gradients, with the interface of ``Projections``. For small models and tests."""

    replicates = 1

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self._shapes = shapes

    def outer(self, rows: SequenceRows, layers: Sequence[Layer], left: Tensors, right: Tensors) -> None:
        for layer, *sides in zip(layers, left, right, strict=True):
            rows.add(layer.weight, rows.outer(*sides))

    def words(self, rows: SequenceRows, layer: Layer, ids: torch.Tensor, n_words: int, right: torch.Tensor) -> None:
        self.outer(rows, [layer], [torch.nn.functional.one_hot(ids, n_words).to(right.dtype)], [right])

    def projected_words(self, rows: SequenceRows, layer: Layer, projected: torch.Tensor, right: torch.Tensor) -> None:
        self.outer(rows, [layer], [projected], [right])

    def vectors(self, rows: SequenceRows, section: str, numbers: Sequence[int], vectors_LSD: torch.Tensor) -> None:
        for number, vector_SD in zip(numbers, vectors_LSD, strict=True):
            rows.add(number, vector_SD)

    def vocabulary(self, n_words: int, weight: int, dtype: torch.dtype) -> None:
        return None

    def finish(self, rows: SequenceRows) -> None:
        pass

    def keys(self, sections: Sequence[str], section_of: Mapping[int, str]) -> list[tuple[Any, str]]:
        return [(number, name) for name in sections for number in sorted(section_of) if section_of[number] == name]

    def size(self, key: Any) -> int:
        return self._shapes[key].numel()

    def working_bytes(self, n_tokens: int, n_sequences: int, left: int, right: int) -> int:
        return 8 * n_sequences * left * right


class Projections:
    """The random projections of one step; the same seed gives the same ones on every rank and device.

    Args:
        dim: k.
        seed: the seed of the signs.
        device: the device of the signs.
        shapes: the parameters' shapes, by number.
        words: the weights whose rows are words.
    """

    replicates = REPLICATES

    def __init__(
        self,
        dim: int,
        seed: int,
        device: torch.device,
        shapes: Sequence[Sequence[int]],
        words: frozenset[int] = frozenset(),
    ) -> None:
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
        self._folds: dict[tuple[int, int], int] = {}  # the shift of each side that is folded, by parameter and axis
        self._places = [self._places_of(number, shape, number in words) for number, shape in enumerate(shapes)]
        self._indices = index_tables([place for places in self._places for place in places], device)
        self._kept: dict[str, torch.Tensor] = {}

    def _places_of(self, number: int, shape: Sequence[int], words: bool) -> list[Place]:
        """Draws the place of each axis of a parameter. ``words``: axis 0 is the vocabulary, projected to k numbers."""
        if len(shape) == 1:
            shift = self._draw(f"place {number}").randrange(self.slots)
            return [Place(self.slots, shift, 0, shape[0])]
        if len(shape) != 2:  # no layer that is tapped has such a weight
            return [Place(1, 0, 0, 0) for _ in shape]
        widths = [min(size, self.side) for size in shape]
        shifts = [
            self._draw(f"shift {side} {number}").randrange(width)
            for side, width in zip(("out", "in"), widths, strict=True)
        ]
        for axis, size in enumerate(shape):
            if size >= self.side and not (words and axis == 0):  # shifted when it is folded
                self._folds[number, axis], shifts[axis] = shifts[axis], 0
        if words:
            widths[0], shifts[0] = VOCABULARY * self.dim, 0
        draw = self._draw(f"place {number}")
        offsets = [draw.randint(0, self.side - width) for width in widths]
        strides = (self.side, 1)
        return [Place(*one) for one in zip(widths, shifts, offsets, widths, strides, strict=True)]

    def _features(self, numbers: Sequence[int], axis: int, like: torch.Tensor) -> torch.Tensor:
        """Returns the (L, M, size) signs of the features of this axis of L parameters of one shape."""
        signs = torch.stack([self._of_features[self._first[number] + axis] for number in numbers])
        return signs.to(like.device, like.dtype).view(len(numbers), REPLICATES, -1)

    def _index(self, numbers: Sequence[int], axis: int, device: torch.device) -> torch.Tensor:
        """Returns the (L, length) indices of this axis of L parameters in the flattened entries, or slots."""
        return torch.stack([self._indices[self._first[number] + axis] for number in numbers]).to(device)

    def _draw(self, name: str) -> random.Random:
        """Returns a random stream for one purpose, so that results don't depend on the order of the layers."""
        return random.Random(f"{self._seed} {name}")

    def _large(self, name: str, count: int) -> torch.Tensor:
        """Returns (count,) int8 signs, and keeps them for the step."""
        if name not in self._kept:
            self._kept[name] = random_signs(f"{self._seed} {name}", count, self.device)
        return self._kept[name]

    def fold_side(self, values: Tensors, axis: int, numbers: Sequence[int]) -> torch.Tensor:
        """Folds this axis of L layers, (R, T, width) each, to (L, M, R, T, side), at least float32.

        A narrower side is returned unchanged, (L, 1, R, T, width): its signs and shift cost less on the sequences' sums
        (``turn_narrow``). The result is rotated by a random shift (``places.py``).
        """
        n_rows, n_tokens, width = values[0].shape
        if width < self.side:
            return torch.stack(list(values))[:, None]
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        tokens = [one.reshape(-1, width) for one in values]
        signs = self._features(numbers, axis, values[0].new_empty(0, dtype=torch.float32))[:, :, None]
        shifts = [self._folds[number, axis] for number in numbers]
        folded = values[0].new_empty(len(values), REPLICATES, len(tokens[0]), self.side, dtype=dtype)
        fold = self._fold_in_few_launches if favours_few_launches(folded.device) else self._fold_in_the_cache
        fold(tokens, signs, shifts, folded)
        return folded.unflatten(2, (n_rows, n_tokens))

    @staticmethod
    def _fold_in_the_cache(tokens: Tensors, signs: torch.Tensor, shifts: Sequence[int], folded: torch.Tensor) -> None:
        step = max(1, TILE_BYTES["cpu"] // (tokens[0].shape[1] * tokens[0].element_size()))
        for layer, values_ND in enumerate(tokens):
            for start in range(0, len(values_ND), step):
                here = slice(start, start + step)
                _fold_by_halves(values_ND[here], signs[layer], shifts[layer], folded[layer, :, here])

    @staticmethod
    def _fold_in_few_launches(
        tokens: Tensors, signs: torch.Tensor, shifts: Sequence[int], folded: torch.Tensor
    ) -> None:
        row_bytes = len(tokens) * tokens[0].shape[1] * tokens[0].element_size()
        step = max(1, TILE_BYTES["cuda"] // row_bytes)
        for start in range(0, len(tokens[0]), step):
            here = slice(start, start + step)
            _fold_in_few_launches([one[here] for one in tokens], list(signs), shifts, folded[:, :, here])

    def turn_narrow(self, sums: torch.Tensor, numbers: Sequence[int], axes: Sequence[int] = (0, 1)) -> torch.Tensor:
        """Applies signs to those axes of (L, M or 1, S, out, in) sums that ``fold_side`` left unchanged.

        Each replicate has signs of its own. With the same signs, the inner products of different layers would be the
        same in both, and the predicted error of a cosine 4 to 9 % too low.
        """
        for axis in axes:
            if sums.shape[3 + axis] < self.side:
                signs_LP1D = self._features(numbers, axis, sums)[:, :, None]
                sums = sums * (signs_LP1D[..., None] if axis == 0 else signs_LP1D[..., None, :])
        return sums

    def fold_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Folds (M, S, side, side), the sum of all layers, to (S, M, slots).

        Rows are padded to an odd width. With a width of 192, a column of LoRA's narrow blocks would use only 32 of 2048
        slots.
        """
        signs = self._large("entries", REPLICATES * self.side**2).to(entries.device, entries.dtype)
        signed = entries * signs.view(REPLICATES, 1, self.side, self.side)
        padded = torch.nn.functional.pad(signed, (0, 1 - self.side % 2))
        return self._wrap(padded.flatten(2).transpose(0, 1))

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

    # ---- adding the gradients of L layers of one shape; ``left`` and ``right``, (R, T, width) each, belong to the two
    # sides of their weights

    def outer(self, rows: SequenceRows, layers: Sequence[Layer], left: Tensors, right: Tensors) -> None:
        """Adds each sequence's ``sum_t left_t right_t^T`` of every layer to the rows' sums."""
        numbers = weights_of(layers)
        if layers[0].kind != "head":
            self._add_folded(rows, layers, self.fold_side(left, 0, numbers), right, (0, 1))
            return
        for layer, number, one, other in zip(layers, numbers, left, right, strict=True):
            self.projected_words(rows, layer, one @ self.vocabulary(one.shape[-1], number, one.dtype), other)

    def words(self, rows: SequenceRows, layer: Layer, ids: torch.Tensor, n_words: int, right: torch.Tensor) -> None:
        """Adds the same for a ``left`` of one-hot vectors of these words."""
        (number,) = weights_of([layer])
        self.projected_words(rows, layer, self.of_words(ids, n_words, number, right.dtype), right)

    def projected_words(self, rows: SequenceRows, layer: Layer, projected: torch.Tensor, right: torch.Tensor) -> None:
        """Adds the same for a ``left`` that is multiplied by ``vocabulary`` already."""
        self._add_folded(rows, [layer], self.split_vocabulary(projected)[None], [right], (1,))

    def _add_folded(
        self, rows: SequenceRows, layers: Sequence[Layer], left: torch.Tensor, right: Tensors, turned: Sequence[int]
    ) -> None:
        """Adds ``left``, (L, M or 1, R, T, width), folded. ``turned``: the axes that get signs after the sum."""
        numbers = weights_of(layers)
        folded = self.fold_side(right, 1, numbers)
        entries = rows.entries_of(layers[0].section, REPLICATES, self.side, folded)
        if left.shape[-1] == folded.shape[-1] == self.side:
            rows.add_outer(entries, left, folded)
            return
        sums = self.turn_narrow(rows.outer(left, folded), numbers, turned).to(entries.device)
        if favours_few_launches(entries.device):
            add_at_once(entries, sums, *(self._index(numbers, axis, sums.device) for axis in (0, 1)))
        else:
            add_by_slices(entries, sums, [self._places[number] for number in numbers])

    def vectors(self, rows: SequenceRows, section: str, numbers: Sequence[int], vectors_LSD: torch.Tensor) -> None:
        """Adds each sequence's gradients (L, S, D) of the vectors that are these parameters."""
        signs_LMD = self._features(numbers, 0, vectors_LSD) / REPLICATES**0.5
        signed = vectors_LSD.transpose(0, 1)[:, None] * signs_LMD.transpose(0, 1)
        total = rows.total_of(section, (len(rows.prompt_S), REPLICATES, self.slots), signed)
        index = self._index(numbers, 0, total.device).flatten().expand(*total.shape[:2], -1)
        total.scatter_add_(2, index, signed.flatten(2).to(total.device))

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

    def working_bytes(self, n_tokens: int, n_sequences: int, left: int, right: int) -> int:
        """Returns the bytes that one layer's fold and sums take at most, for sides of these widths."""
        left, right = min(left, self.side), min(right, self.side)
        tokens = 2 * n_tokens * (left + right)  # twice: cut into pieces
        sums = 0 if left == right == self.side else 3 * n_sequences * left * right
        return 4 * REPLICATES * (tokens + sums)

    def numbers(self) -> int:
        """Returns how many signs are kept in memory."""
        return sum(self._sizes) + sum(signs.numel() for signs in self._kept.values())
