"""Sums up what the layers' taps record in one step: each sequence's sketch, and sums for the gradient check.

Shapes: S sequences of a micro-batch, R rows, T positions, N tokens of all rows, H hidden, V words, D width of a vector.

A Linear layer's gradient is a sum over tokens, ``sum_t d_t a_t^T``, of the output's gradient d and the input a. Each
function here computes these two from a tap's tensors, and passes them to the projection and to the check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from grpo_kernels.backend import rounds_products
from grpo_kernels.head.products import compute_dtype

from .layer_batches import LayerBatches, Recorded, kept_bytes
from .layer_taps import Layer, norm_options, norm_output
from .projections import IdentityProjection, Projections, weights_of
from .sequence_rows import SequenceRows
from .tap_check import TapCheck


class LayerSums:
    """The sums of one step.

    Attributes:
        micro_batches: the rows of each micro-batch so far.
        rows: the rows of the running forward or backward pass; None: the pass isn't recorded.
        late: whether a backward pass of earlier rows has run since these rows began.
    """

    def __init__(
        self,
        projection: Projections | IdentityProjection,
        check: TapCheck,
        parameters: Sequence[nn.Parameter],
        fail: Callable[[Layer, Exception], None],
    ) -> None:
        self.projection, self.check, self._parameters, self._fail = projection, check, parameters, fail
        self.rows: SequenceRows | None = None
        self.micro_batches: list[SequenceRows] = []
        self._batches = LayerBatches(self._process)
        self._muted = False
        self.late = False

    def mute(self) -> None:
        """Drops all sums, and adds none from here on."""
        self._muted = True
        self._batches.clear()
        for rows in self.micro_batches:
            rows.total.clear()
            rows.entries.clear()

    def begin(self, rows: SequenceRows) -> None:
        """Starts a micro-batch with these rows, after it has folded the previous one's sums."""
        self.finish()
        self.rows, self.late = rows, False
        self.micro_batches.append(rows)

    def end(self) -> None:
        """Ends a micro-batch: processes what its taps recorded."""
        self.rows = None
        self._batches.flush()

    def finish(self) -> None:
        """Processes what the taps recorded, and folds the sums of all micro-batches to their sketches."""
        self._batches.flush()
        for rows in self.micro_batches:
            self.projection.finish(rows)

    def take(self, key: Any, device: torch.device) -> torch.Tensor:
        """Removes and returns the sketch (B, M, K) under this key; 0 where no layer added anything."""
        size = self.projection.size(key)
        of_rows = [
            rows.total.pop(key).flatten(1).to(device)
            if key in rows.total
            else torch.zeros(len(rows.prompt_S), size, device=device)
            for rows in self.micro_batches
        ]
        return torch.cat(of_rows).unflatten(1, (self.projection.replicates, -1))

    def add(self, layer: Layer, rows: SequenceRows, gradient: torch.Tensor, layer_input: torch.Tensor) -> None:
        """Records a layer's input and the gradient of its output, to be added with others of its shape."""
        if self._muted:
            return
        if layer.kind == "embedding":
            self._embedding(layer, rows, gradient, layer_input)
            return
        d, a = rows.tokens(layer.name, gradient), rows.tokens(layer.name, layer_input)
        self._note_precision(layer, d, a)
        if layer.kind == "norm":  # Liger's norms overwrite it with the input's gradient
            gradient = gradient.clone()
        key = (id(rows), layer.kind, layer.section, layer.weight is None, layer.bias is None, norm_options(layer))
        shapes = tuple((one.shape, one.dtype, one.device) for one in (gradient, layer_input))
        self._batches.add((key, shapes), Recorded(layer, rows, gradient, layer_input))

    def _process(self, group: list[Recorded]) -> None:
        """Adds the gradients of layers of one shape, as many at a time as fit into the bound of bytes."""
        (first, *_), n_sequences = group, len(group[0].rows.prompt_S)
        widths = first.gradient.shape[-1], first.layer_input.shape[-1]
        n_tokens = first.gradient.numel() // max(1, widths[0])
        if first.layer.kind == "norm":
            each = 32 * max(1, first.gradient.numel())  # input, slope, gradient and products in float32
        else:
            each = self.projection.working_bytes(n_tokens, n_sequences, *widths)
        count = max(1, kept_bytes(first.gradient.device) // max(1, each))
        add = self._norms if first.layer.kind == "norm" else self._linears
        while group:
            part, group[:count] = group[:count], []
            try:
                add(part[0].rows, [one.layer for one in part], part)
            except Exception as error:
                for one in part:
                    self._fail(one.layer, error)

    def _linears(self, rows: SequenceRows, layers: Sequence[Layer], recorded: Sequence[Recorded]) -> None:
        d = [rows.tokens("", one.gradient) for one in recorded]
        a = [rows.tokens("", one.layer_input) for one in recorded]
        left, right = (a, d) if layers[0].kind == "transposed" else (d, a)
        if layers[0].weight is not None:
            due = [i for i, number in enumerate(weights_of(layers)) if self._due(number, rows)]
            signs = [self._left_signs(layers[i], left[i].shape[-1]).to(left[i]) for i in due]
            if due:
                probed = [left[i] @ sign for i, sign in zip(due, signs, strict=True)]
                self.check.outer([weights_of(layers)[i] for i in due], rows, probed, [right[i] for i in due])
            self.projection.outer(rows, layers, left, right)
        if layers[0].bias is not None:
            self._vectors(layers, [layer.bias for layer in layers], rows, rows.sums(torch.stack(d)))

    def _embedding(self, layer: Layer, rows: SequenceRows, gradient: torch.Tensor, ids: torch.Tensor) -> None:
        d = rows.tokens(layer.name, gradient)
        self._note_precision(layer, d)
        ids = ids.reshape(d.shape[:2])
        embedding: Any = layer.module
        if type(embedding).forward is not nn.Embedding.forward:  # Gemma multiplies the looked-up rows
            scale = getattr(embedding, "embed_scale", 1.0)
            d = d * (scale.to(d.dtype) if isinstance(scale, torch.Tensor) else scale)
        if embedding.padding_idx is not None:  # torch gives that row no gradient
            d = d * (ids != embedding.padding_idx)[..., None]
        if layer.weight is None:
            return
        n_words = embedding.num_embeddings
        if self._due(layer.weight, rows):
            self.check.outer([layer.weight], rows, [self._left_signs(layer, n_words).to(d.dtype)[ids]], [d])
        self.projection.words(rows, layer, ids, n_words, d)

    def _norms(self, rows: SequenceRows, layers: Sequence[Layer], recorded: Sequence[Recorded]) -> None:
        """Adds norms' gradients. Their output is linear in the weight: slope = output(weight 1) - output(weight 0)."""
        d = torch.stack([rows.tokens("", one.gradient) for one in recorded])
        if layers[0].weight is not None:
            a = torch.cat([one.layer_input for one in recorded]).float()
            slope = norm_output(layers[0].module, 1.0, a)
            if not layers[0].zero_at_zero:
                slope = slope - norm_output(layers[0].module, 0.0, a)
            products = d.float() * slope.float().reshape(d.shape)
            self._vectors(layers, [layer.weight for layer in layers], rows, rows.sums(products))
        if layers[0].bias is not None:
            self._vectors(layers, [layer.bias for layer in layers], rows, rows.sums(d))

    def add_head(
        self, layer: Layer, rows: SequenceRows, projected_NK: torch.Tensor, hidden_NH: torch.Tensor, n_words: int
    ) -> None:
        """Adds the LM head's gradient if a fused kernel computes it.

        Args:
            rows: the rows of the N tokens, laid out as a single row.
            projected_NK: dL/dlogits times the projection's ``vocabulary``.
            hidden_NH: the hidden states.
            n_words: V.
        """
        if self._muted:
            return
        assert layer.weight is not None
        weight, projected, hidden = layer.weight, projected_NK[None], hidden_NH[None]
        if self._due(weight, rows):
            self._left_signs(layer, n_words)
            mix = self.check.signs(projected.shape[-1], 0, projected)
            self.check.outer([weight], rows, [projected @ mix], [hidden.to(projected.dtype)])
        self.projection.projected_words(rows, layer, projected, hidden)

    def note_head_precision(self, layer: Layer, hidden_NH: torch.Tensor) -> None:
        """Notes in the check whether the head multiplies in half precision. Call it in the forward, under autocast."""
        assert layer.weight is not None
        if rounds_products(hidden_NH.device, compute_dtype(hidden_NH), self._parameters[layer.weight].dtype):
            self.check.mark_half_precision(layer.weight)

    def _vectors(
        self, layers: Sequence[Layer], parameters: Sequence[int | None], rows: SequenceRows, vectors_LSD: torch.Tensor
    ) -> None:
        numbers = [number for number in parameters if number is not None]
        due = [i for i, number in enumerate(numbers) if self._due(number, rows)]
        if due:
            chosen = vectors_LSD if len(due) == len(numbers) else torch.stack([vectors_LSD[i] for i in due])
            self.check.vector([numbers[i] for i in due], chosen)
        self.projection.vectors(rows, layers[0].section, numbers, vectors_LSD)

    def _due(self, number: int, rows: SequenceRows) -> bool:
        """Returns whether the check needs these rows' sum of this parameter."""
        return rows.checked and number in self.check.due

    def _note_precision(self, layer: Layer, *operands: torch.Tensor) -> None:
        """Notes in the check whether the layer's gradient has half precision, by its products or its dtype."""
        for number in (layer.weight, layer.bias):
            if number is not None:
                dtypes = (*(tensor.dtype for tensor in operands), self._parameters[number].dtype)
                if rounds_products(operands[0].device, *dtypes):
                    self.check.mark_half_precision(number)

    def _left_signs(self, layer: Layer, width: int) -> torch.Tensor:
        """Returns the (width, PROBES) signs by which the check projects the weight's left side.

        For a weight with one row per word they are made from the projection's signs, because a fused head passes only
        dL/dlogits times those.
        """
        assert layer.weight is not None
        words = None
        if layer.kind in ("head", "embedding") and layer.weight not in self.check.word_signs:
            words = self.projection.vocabulary(width, layer.weight, torch.float32)
        if words is not None:
            self.check.word_signs[layer.weight] = words @ self.check.signs(words.shape[1], 0, words)
        signs = self.check.word_signs.get(layer.weight)
        return self.check.signs(width, 0) if signs is None else signs


def head_token_rows(rows: SequenceRows, sequence_N: torch.Tensor) -> SequenceRows:
    """Returns rows with the same sums, for N tokens laid out as one row; ``sequence_N`` (N,) is each one's sequence."""
    return SequenceRows(rows.prompt_S, sequence_N[None], 1, rows.checked, rows.total, rows.entries)


def make_rows(prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None, checked: bool) -> SequenceRows:
    """Returns the rows of a micro-batch. Raises ``ValueError`` for wrong shapes, dtypes or sequence indices."""
    if not isinstance(prompt_S, torch.Tensor) or prompt_S.ndim != 1 or prompt_S.is_floating_point():
        got = f"{tuple(prompt_S.shape)} of {prompt_S.dtype}" if isinstance(prompt_S, torch.Tensor) else prompt_S
        raise ValueError(f"prompt ids must be an integer tensor (S,), got {got}")
    if sequence_RT is not None:
        right = isinstance(sequence_RT, torch.Tensor) and sequence_RT.ndim == 2
        if not right or sequence_RT.is_floating_point():
            given = tuple(sequence_RT.shape) if isinstance(sequence_RT, torch.Tensor) else sequence_RT
            raise ValueError(f"sequence_RT must be an integer tensor (R, T), got {given}")
        if sequence_RT.numel() and not -1 <= int(sequence_RT.min()) <= int(sequence_RT.max()) < len(prompt_S):
            raise ValueError(f"sequence_RT must hold values in [-1, {len(prompt_S)}): prompt ids are for that many")
    n_rows = len(prompt_S) if sequence_RT is None else len(sequence_RT)
    return SequenceRows(prompt_S.clone(), sequence_RT, n_rows, checked)
