"""Computes the head's matrix products tile by tile: logits = hidden weight^T, dL/dhidden and dL/dweight.

Shapes: N tokens, C tokens of one tile, H hidden, V vocabulary, R rank of an adapter on the head.

Each product takes 2 C V H floating-point operations and is rounded once. Gradients are summed over tiles in float32
(float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.backend import native_half
from grpo_kernels.memory import empty, workspace

# A tile has all columns of the vocabulary and as many rows as fit. More rows make products more efficient and need
# fewer passes over dL/dW. Measured on two cores (1024 tokens, H 576, V 49152; time relative to 1024 rows; medians):
#   rows                     64    128    256    512
#   fp32 trainable         1.38   1.13   1.06   1.02
#   fp32 frozen            1.51   1.24   1.10   1.00
#   bf16 trainable         2.11   1.56   1.24   1.07
#   bf16 frozen            1.47   1.22   1.06   1.01
# 150 MiB are 256 rows of the largest vocabularies in float32. The peak memory is then below a third of TRL's.
TILE_BYTES = {"cpu": 150 << 20, "cuda": 1 << 30}
MAX_TILE_ROWS = {"cpu": 512, "cuda": 4096}
# The number of columns that are widened from half precision, or added to a float32 sum, at a time.
# (Relative times, bf16 trainable: 1024 1.11, 2048 1.03, 4096 1.01, 8192 1.00, 16384 1.07, all columns 1.04.)
VOCABULARY_BLOCK = 8192


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which ``torch.nn.functional.linear`` multiplies: autocast's if it is on, else hidden's."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def tile_rows(n_vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Returns the rows of a tile of at most ``TILE_BYTES``: a multiple of 16 in [16, 512], or [16, 4096] on a GPU."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    rows = TILE_BYTES[kind] // (n_vocabulary * itemsize)
    return max(16, min(MAX_TILE_ROWS[kind], rows // 16 * 16))


@dataclass
class Factor:
    """One term of the logits, ``inputs_NK @ weight_VK^T``: the head itself, or a low-rank adapter on it.

    Attributes:
        inputs_grad, weight_grad: float32 sums; None if no gradient is needed.
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
        gradient_rows: the most rows that ``accumulate`` will get.
        sketch: if given, ``projected`` collects the values for ``sketch.add``.
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
    ) -> None:
        hidden, weight = factors[0]
        self.device = hidden.device
        self.n_rows, self.n_vocabulary = hidden.shape[0], weight.shape[0]
        self.half = dtype.itemsize == 2
        self.dtype = dtype if not self.half or native_half(dtype, self.device) else torch.float32
        self.widen = self.half and self.dtype == torch.float32
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        # CUDA computes float32 logits from half operands at no extra cost; a CPU rounds the product to half precision
        self.tile_dtype = self.dtype if self.device.type == "cpu" else self.sum_dtype
        self.factors = [
            Factor(
                inputs.to(self.dtype),
                matrix if self.widen else matrix.to(self.dtype),
                inputs.new_zeros(inputs.shape, dtype=self.sum_dtype) if want_input else None,
            )
            for (inputs, matrix), want_input in zip(factors, want_inputs, strict=True)
        ]
        # a single tile's product is the whole gradient: no sum is needed, and it is rounded once to the operands' dtype
        step = tile_rows(self.n_vocabulary, self.tile_dtype.itemsize, self.device)
        self._weight_dtype = self.dtype if gradient_rows <= step else self.sum_dtype
        self._want_weights = want_weights
        self._want_bias = want_bias
        self.bias_grad: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None
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

    def tiles(self, order: torch.Tensor | None, start: int, stop: int) -> Iterator[torch.Tensor | slice]:
        """Yields the rows of each tile of ``order[start:stop]``; slices if ``order`` is None (rows as they are)."""
        step = tile_rows(self.n_vocabulary, self.tile_dtype.itemsize, self.device)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            yield slice(begin, end) if order is None else order[begin:end]

    def _blocks(self) -> list[slice]:
        step = VOCABULARY_BLOCK if self.half else self.n_vocabulary
        return [slice(v, min(v + step, self.n_vocabulary)) for v in range(0, self.n_vocabulary, max(1, step))]

    def logits(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Computes the tile (C, V) of these rows, in 2 C V H operations. All tiles share one buffer."""
        count = len(rows) if isinstance(rows, torch.Tensor) else rows.stop - rows.start
        if self._buffer is None:
            step = min(self.n_rows, tile_rows(self.n_vocabulary, self.tile_dtype.itemsize, self.device))
            # each row starts at a multiple of 16 elements, so that kernels can read 16 bytes at a time for every V
            width = -(-self.n_vocabulary // 16) * 16
            self._buffer = workspace((step, width), self.tile_dtype, self.device)
            # oneDNN's bfloat16 product on AMX reads rows up to a multiple of 4 columns and multiplies the padding by 0,
            # which gives NaN if the padding holds NaN. A contiguous tile would avoid that, but odd rows are slower.
            if self.device.type == "cpu":
                self._buffer[:, self.n_vocabulary :].zero_()
        tile = self._buffer[:count, : self.n_vocabulary]
        for number, factor in enumerate(self.factors):
            inputs = factor.inputs[rows]
            if self.widen:
                for block in self._blocks():
                    _multiply_into(tile[:, block], inputs, factor.weight[block].float().t(), add=number > 0)
            else:
                _multiply_into(tile, inputs, factor.weight.t(), add=number > 0)
        return tile

    def accumulate(self, tile: torch.Tensor, rows: torch.Tensor | slice, factor_C: torch.Tensor) -> None:
        """Adds the tile's part to every wanted gradient, in 4 C V H operations.

        The tile holds dL/dlogits, divided by ``factor_C`` of each row.
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
                factor.inputs_grad[rows] = product.to(self.sum_dtype).mul_(factor_C[:, None])
            if self._want_weights[number]:
                self._accumulate_weight(factor, tile, factor.inputs[rows].to(self.sum_dtype), factor_C)
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
        """Releases the tile's buffer."""
        self._buffer = None

    def _accumulate_weight(
        self, factor: Factor, tile_CV: torch.Tensor, inputs_CK: torch.Tensor, factor_C: torch.Tensor
    ) -> None:
        """Adds ``tile^T (factor_C * inputs)``. The first tile overwrites, so the sum needn't be initialised."""
        unit = _half_unit(inputs_CK, factor_C) if self.dtype == torch.float16 else None
        operand = (inputs_CK * (factor_C if unit is None else factor_C / unit)[:, None]).to(self.dtype)
        first = factor.weight_grad is None
        if factor.weight_grad is None:
            factor.weight_grad = empty(factor.weight.shape, self._weight_dtype, self.device)
        total = factor.weight_grad
        if total.dtype == self.dtype:  # the only tile: its unit is applied when the gradient is returned
            factor.weight_unit = unit
            _multiply_into(total, tile_CV.t(), operand, add=not first)
        elif self.device.type != "cpu":
            scale = 1.0 if unit is None else unit.item()  # waits for the GPU, with float16 only
            _multiply_into(total, tile_CV.t(), operand, add=not first, scale=scale)
        else:  # a CPU rounds products of half operands to half precision, so blocks are added in float32
            for block in self._blocks():
                product = torch.mm(tile_CV[:, block].t(), operand)
                if unit is not None:
                    product = product.to(total.dtype).mul_(unit)
                total[block].copy_(product) if first else total[block].add_(product)

    def weight_grads(self) -> list[torch.Tensor | None]:
        """Returns dL/dweight of each factor, without its ``weight_unit``; zeros if no row had a gradient."""
        return [
            factor.weight.new_zeros(factor.weight.shape)
            if wanted and factor.weight_grad is None
            else factor.weight_grad
            for factor, wanted in zip(self.factors, self._want_weights, strict=True)
        ]


def _multiply_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool, scale: float = 1.0) -> None:
    """Computes ``out = scale * a b``, or ``out += scale * a b`` with ``add``."""
    options: Mapping[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, alpha=scale, out=out, **options)
        return
    torch.mm(a, b, out=out, **options)
    if scale != 1.0:
        out.mul_(scale)


def _half_unit(inputs_CK: torch.Tensor, factor_C: torch.Tensor) -> torch.Tensor:
    """Returns the unit (0-d) by which ``factor_C * inputs`` is divided to fit into float16.

    It is the largest factor, or more if the sum over rows could still exceed 32768, half of float16's largest number. A
    fixed unit wouldn't do: off policy, a ratio or a KL term may be a thousand times as large as on policy.
    """
    size_C = factor_C.abs()
    unit = torch.maximum(size_C.max(), size_C.sum() * inputs_CK.abs().max() / 2**15)
    return torch.where(unit > 0, unit, 1.0)
