"""Computes the head's matrix products tile by tile: logits = hidden weight^T, dL/dhidden and dL/dweight.

Shapes: N tokens, C tokens of one tile, H hidden, V vocabulary, R rank of an adapter on the head.

Each product takes 2 C V H floating-point operations and is rounded once. Gradients of up to 2 H rows are kept, and
multiplied at once (``tiles.py``); sums over several such windows are in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.backend import native_half
from grpo_kernels.memory import empty, workspace

from .tiles import most_kept_rows, most_tile_rows, padded, plan_tiles

# The number of columns that are widened from half precision, or added to a float32 sum, at a time.
# (Relative times, bf16 trainable: 1024 1.11, 2048 1.03, 4096 1.01, 8192 1.00, 16384 1.07, all columns 1.04.)
VOCABULARY_BLOCK = 8192


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which ``torch.nn.functional.linear`` multiplies: autocast's if it is on, else hidden's."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


# Called as row_pass(tile_CV, rows, kept_CV); returns dL/dlogits divided by a factor of each row, and the factor (C,).
# It may write dL/dlogits to kept_CV, in the products' dtype, unless that is None; otherwise they replace the tile.
RowPass = Callable[[torch.Tensor, torch.Tensor | slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Factor:
    """One term of the logits, ``inputs_NK @ weight_VK^T``: the head itself, or a low-rank adapter on it.

    Attributes:
        inputs_grad: in float32; None if it isn't needed.
        weight_grad: the only window's product in the operands' dtype, or a float32 sum; None if it isn't needed.
        weight_unit: 0-d, by which ``weight_grad`` must still be multiplied; None: 1.
    """

    inputs: torch.Tensor
    weight: torch.Tensor
    inputs_grad: torch.Tensor | None = None
    weight_grad: torch.Tensor | None = None
    weight_unit: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadSketch:
    """Makes the head also return dL/dlogits projected to k numbers per token.

    The interference log computes each sequence's part of dL/dweight from them. It costs 2 N V k operations.

    Attributes:
        projection: (V, k), or None for dL/dlogits itself.
        add: called once in the backward with the projections (N, k) in float32 (float64), 0 for tokens without a
            gradient.
        on_error: called with an exception that the projection raises; the loss goes on without it. None: the exception
            is raised.
    """

    projection: torch.Tensor | None
    add: Callable[[torch.Tensor], None]
    on_error: Callable[[Exception], None] | None = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Passes an exception raised in this context to ``on_error``."""
        try:
            yield
        except Exception as error:
            if self.on_error is None:
                raise
            self.on_error(error)


class HeadProducts:
    """Computes the three products of each tile, for the head and an optional low-rank adapter, in one compute dtype.

    Args:
        factors: (inputs, weight) of the head, and of the adapter.
        want_inputs, want_weights, want_bias: which gradients to compute.
        gradient_rows: how many rows have a gradient; the first of ``order`` in ``run_windows``.
        sketch: if given, ``projected`` collects the values for ``sketch.add``.
        float32_logits: whether tiles of half-precision operands are in float32, on devices that can.
    """

    def __init__(
        self,
        factors: list[tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
        *,
        want_inputs: list[bool],
        want_weights: list[bool],
        want_bias: bool = False,
        gradient_rows: int = 0,
        sketch: HeadSketch | None = None,
        float32_logits: bool = True,
    ) -> None:
        hidden, weight = factors[0]
        self.device = hidden.device
        self.n_rows, self.n_vocabulary = hidden.shape[0], weight.shape[0]
        self.half = dtype.itemsize == 2
        self.dtype = dtype if not self.half or native_half(dtype, self.device) else torch.float32
        self.widen = self.half and self.dtype == torch.float32
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self.tile_dtype = self.sum_dtype if float32_logits and keeps_float32(self.device) else self.dtype
        self.factors = [
            Factor(
                inputs.to(self.dtype),
                matrix if self.widen else matrix.to(self.dtype),
                inputs.new_zeros(inputs.shape, dtype=self.sum_dtype) if want_input else None,
            )
            for (inputs, matrix), want_input in zip(factors, want_inputs, strict=True)
        ]
        most_tile = most_tile_rows(self.n_vocabulary, self.tile_dtype.itemsize, self.device)
        keep = want_weights[0] and self.dtype.itemsize == 2
        most_kept = most_kept_rows(weight.shape[1], self.n_vocabulary, 2, self.device) if keep else 0
        self.plan = plan_tiles(self.n_rows, gradient_rows, most_tile, most_kept)
        # a single window's product is the whole gradient: no sum is needed, and it is rounded once
        self._weight_dtype = self.dtype if len(self.plan.windows) <= 1 else self.sum_dtype
        self._want_weights = want_weights
        self._want_bias = want_bias
        self.bias_grad: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None
        self.projected: torch.Tensor | None = None
        self._projection: torch.Tensor | None = None
        self._sketch = sketch
        if sketch is not None:
            self._start_projecting(sketch)

    def _start_projecting(self, sketch: HeadSketch) -> None:
        with sketch.guarded():
            width = self.n_vocabulary
            if sketch.projection is not None:
                self._projection = sketch.projection.to(self.dtype)
                width = self._projection.shape[1]
            self.projected = torch.zeros((self.n_rows, width), dtype=self.sum_dtype, device=self.device)

    def run_windows(self, order: torch.Tensor | None, row_pass: RowPass, *, free_of_zero_rows: bool = True) -> None:
        """Computes the tiles of the rows with a gradient, and accumulates their gradients, a window at a time.

        Args:
            order: the rows, those with a gradient first; None: as they are.
            row_pass: turns a tile into its gradient, see ``RowPass``.
            free_of_zero_rows: False if factors may be 0. Rows with factor 0 are then left out of the products on a CPU.
                On a GPU that would wait for the device; there they are multiplied by 0.
        """
        for window in self.plan.windows:
            start, stop = window[0][0], window[-1][1]
            passes = [self._tile_gradient(pick(order, *tile), tile[0] - start, row_pass) for tile in window]
            gradients_CV, factor_C = passes[0]
            if self.plan.keeps:
                gradients_CV, factor_C = self._slot(0, stop - start), torch.cat([factor_C for _, factor_C in passes])
            rows = pick(order, start, stop)
            if not free_of_zero_rows and reads_are_free(self.device):
                gradients_CV, rows, factor_C = _drop_zero_rows(gradients_CV, rows, factor_C)
            self.accumulate(gradients_CV, rows, factor_C)

    def _tile_gradient(
        self, rows: torch.Tensor | slice, start: int, row_pass: RowPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes a tile's gradient and its factor; kept gradients go to the window's rows from ``start`` on."""
        kept_CV = self._slot(start, start + _count(rows)) if self.plan.keeps else None
        tile_CV = self.logits(rows, kept_CV if self.tile_dtype == self.dtype else None)
        gradients_CV, factor_C = row_pass(tile_CV, rows, kept_CV)
        if kept_CV is not None and gradients_CV is not kept_CV:
            kept_CV.copy_(gradients_CV)
        return gradients_CV, factor_C

    def _slot(self, begin: int, end: int) -> torch.Tensor:
        """Returns these rows of the buffer for kept gradients, (C, V)."""
        if self._kept is None:
            shape = (self.plan.kept_rows, padded(self.n_vocabulary))
            self._kept = self._clear_padding(empty(shape, self.dtype, self.device))
        return self._kept[begin:end, : self.n_vocabulary]

    def _clear_padding(self, buffer: torch.Tensor) -> torch.Tensor:
        """Zeroes the columns beyond the vocabulary, on a CPU.

        oneDNN's bfloat16 product on AMX reads rows up to a multiple of 4 columns and multiplies the padding by 0, which
        gives NaN if the padding holds NaN. A contiguous buffer would avoid that, but odd rows are slower.
        """
        if self.device.type == "cpu":
            buffer[:, self.n_vocabulary :].zero_()
        return buffer

    def _blocks(self) -> list[slice]:
        step = VOCABULARY_BLOCK if self.half else self.n_vocabulary
        return [slice(v, min(v + step, self.n_vocabulary)) for v in range(0, self.n_vocabulary, max(1, step))]

    def logits(self, rows: torch.Tensor | slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the tile (C, V) of these rows, in 2 C V H operations. Without ``out`` all tiles share one buffer."""
        tile = self._tile(_count(rows)) if out is None else out
        for number, factor in enumerate(self.factors):
            inputs = factor.inputs[rows]
            if self.widen:
                for block in self._blocks():
                    _multiply_into(tile[:, block], inputs, factor.weight[block].float().t(), add=number > 0)
            else:
                _multiply_into(tile, inputs, factor.weight.t(), add=number > 0)
        return tile

    def _tile(self, count: int) -> torch.Tensor:
        """Returns the buffer of all tiles, (count, V)."""
        if self._buffer is None:
            shape = (self.plan.tile_rows, padded(self.n_vocabulary))
            self._buffer = self._clear_padding(workspace(shape, self.tile_dtype, self.device))
        return self._buffer[:count, : self.n_vocabulary]

    def accumulate(self, tile: torch.Tensor, rows: torch.Tensor | slice, factor_C: torch.Tensor) -> None:
        """Adds a window's part to every wanted gradient, in 4 C V H operations.

        The window, or tile, holds dL/dlogits, divided by ``factor_C`` of each row.
        """
        if tile.dtype != self.dtype:  # on a GPU the torch backend's tile is float32 for half operands
            tile = tile.to(self.dtype)
        for number, factor in enumerate(self.factors):
            if factor.inputs_grad is not None:
                if self.widen:
                    product = torch.zeros(tile.shape[0], factor.weight.shape[1], device=self.device)
                    for block in self._blocks():
                        product.addmm_(tile[:, block], factor.weight[block].float())
                else:
                    product = torch.mm(tile, factor.weight)
                if isinstance(rows, slice):
                    torch.mul(product, factor_C[:, None], out=factor.inputs_grad[rows])
                else:
                    factor.inputs_grad[rows] = product * factor_C[:, None]
            if self._want_weights[number]:
                self._accumulate_weight(factor, tile, factor.inputs[rows], factor_C)
        if self._want_bias:
            if self.bias_grad is None:
                self.bias_grad = torch.zeros(self.n_vocabulary, dtype=self.sum_dtype, device=self.device)
            for block in self._blocks():
                self.bias_grad[block] += factor_C @ tile[:, block].to(self.sum_dtype)
        if self.projected is not None and self._sketch is not None:
            projected, self.projected = self.projected, None
            with self._sketch.guarded():
                product = tile if self._projection is None else torch.mm(tile, self._projection)
                projected[rows] = product.to(self.sum_dtype) * factor_C[:, None]
                self.projected = projected

    def release(self) -> None:
        """Releases the buffers of tile and gradients."""
        self._buffer = self._kept = None

    def _accumulate_weight(
        self, factor: Factor, tile_CV: torch.Tensor, inputs_CK: torch.Tensor, factor_C: torch.Tensor
    ) -> None:
        """Adds ``tile^T (factor_C * inputs)``. The first window overwrites, so the sum needn't be initialised."""
        first = factor.weight_grad is None
        if factor.weight_grad is None:
            factor.weight_grad = empty(factor.weight.shape, self._weight_dtype, self.device)
        total = factor.weight_grad
        if self.dtype == torch.float16:
            unit = _half_unit(inputs_CK, factor_C)
            if factor.weight_unit is not None:  # brings the sum so far to the larger of the two units
                unit = torch.maximum(unit, factor.weight_unit)
                total.mul_(factor.weight_unit / unit)
            factor.weight_unit, factor_C = unit, factor_C / unit
        operand = (inputs_CK * factor_C[:, None]).to(self.dtype)
        if total.dtype == self.dtype or keeps_float32(self.device):
            _multiply_into(total, tile_CV.t(), operand, add=not first)
        else:  # a CPU rounds products of half operands to half precision, so blocks are added in float32
            for block in self._blocks():
                product = torch.mm(tile_CV[:, block].t(), operand)
                total[block].copy_(product) if first else total[block].add_(product)

    def weight_grads(self) -> list[torch.Tensor | None]:
        """Returns dL/dweight of each factor, without its ``weight_unit``; zeros if no row had a gradient."""
        return [
            factor.weight.new_zeros(factor.weight.shape)
            if wanted and factor.weight_grad is None
            else factor.weight_grad
            for factor, wanted in zip(self.factors, self._want_weights, strict=True)
        ]


def pick(order: torch.Tensor | None, begin: int, end: int) -> torch.Tensor | slice:
    """Returns these rows of ``order``; a slice if ``order`` is None."""
    return slice(begin, end) if order is None else order[begin:end]


def _count(rows: torch.Tensor | slice) -> int:
    return len(rows) if isinstance(rows, torch.Tensor) else rows.stop - rows.start


def keeps_float32(device: torch.device) -> bool:
    """Returns whether the device returns float32 products of half operands, which CUDA does at no extra cost.

    A CPU rounds such a product to half precision.
    """
    return device.type != "cpu"


def reads_are_free(device: torch.device) -> bool:
    """Returns whether Python can read a tensor's value without waiting for queued work."""
    return device.type == "cpu"


def _drop_zero_rows(
    tile_CV: torch.Tensor, rows: torch.Tensor | slice, factor_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor]:
    """Moves the rows whose factor isn't 0 to the front of the tile, in place, and returns them."""
    live_C = factor_C != 0
    count = int(live_C.sum())
    if count == len(factor_C):
        return tile_CV, rows, factor_C
    position = torch.arange(len(factor_C), device=tile_CV.device)
    numbers = position + rows.start if isinstance(rows, slice) else rows.clone()
    holes = position[~live_C & (position < count)]
    movers = position[live_C & (position >= count)]
    for values in (tile_CV, numbers, factor_C):
        values[holes] = values[movers]
    return tile_CV[:count], numbers[:count], factor_C[:count]


def _multiply_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool) -> None:
    """Computes ``out = a b``, or ``out += a b`` with ``add``."""
    options: Mapping[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def _half_unit(inputs_CK: torch.Tensor, factor_C: torch.Tensor) -> torch.Tensor:
    """Returns the unit (0-d) by which ``factor_C * inputs`` is divided to fit into float16.

    It is the largest factor, or more if the sum over rows could still exceed 32768, half of float16's largest number. A
    fixed unit wouldn't do: off policy, a ratio or a KL term may be a thousand times as large as on policy.
    """
    size_C = factor_C.abs()
    unit = torch.maximum(size_C.max(), size_C.sum() * inputs_CK.abs().max() / 2**15)
    return torch.where(unit > 0, unit, 1.0)
