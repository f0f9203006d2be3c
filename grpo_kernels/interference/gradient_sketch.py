"""What each sequence contributed to a step's gradient, small enough to keep: taps on layers, around any training loop.

Shapes: S sequences of a micro-batch, B of the step, R rows of a micro-batch, T positions, k the sketch's width.

A Linear layer's gradient is a sum over tokens, ``sum_t d_t a_t^T``, of the output's gradient d and the input a. A tap
sees both in the backward pass, and adds each sequence's own sum, projected on both sides, to that sequence's k * k
numbers (``projections.py``). The sketch is linear: it adds over tokens, layers, micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from grpo_kernels.backend import rounds_products
from grpo_kernels.head.products import HeadSketch, compute_dtype

from .layer_taps import Layer, find_layers, norm_at, tap, whole_shape
from .model_parts import PARTS_OF_MODEL, block_of, part_of
from .projections import PARTS, Projections
from .sequence_rows import SequenceRows
from .tap_check import GradientPart, TapCheck

StopRecomputation: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())
CHECK_EVERY = 8  # steps, of a parameter that was found right before
WHOLE = "model"  # the only section, unless by parts


@dataclass(frozen=True)
class StepSketch:
    """One step's sequences: ``sketch`` (B, parts, numbers) or, exact, (B, parameters), float32, and ``prompt_B``.

    ``sections``: of the model, by name: which of the last dimension's numbers are of it. Inner products of sections
    sum to the whole's.
    """

    sketch: torch.Tensor
    prompt_B: torch.Tensor
    sections: dict[str, slice] = field(default_factory=dict)

    def gram(self) -> torch.Tensor:
        """(B, B) float64 inner products of the sequences' contributions: ``K = U U^T``."""
        flat = self.sketch.flatten(1).double()
        return flat @ flat.T


class GradientSketch:
    """Taps on a model's layers, and each sequence's part of the gradient of the steps they are opened for::

        sketch = GradientSketch(model, dim=64)
        with sketch.step(seed=step) as recorded:
            for batch in micro_batches:
                with sketch.rows(batch["prompt_id"]):  # (R,), one for each row
                    loss_of(model(batch["input_ids"])).backward()
        gram_BB = recorded[0].gram()

    Between steps nothing hangs on the model. The taps never change a forward or backward value. Tapped are trainable
    Linear (also GPT-2's, transposed) and Embedding layers (so LoRA's A and B, also over 4-bit weights, which stay
    frozen), and
    norms: modules with one vector as weight, and maybe a bias, by which their output is linear in it. Tied weights
    share their projection. What isn't followed rightly ``leave_out_wrong`` finds out.
    Gradient checkpointing of both kinds, autocast, DDP and FSDP2 are fine; ``torch.compile`` of the whole model isn't:
    hooks of a compiled module are not called.

    Args:
        model: any torch module.
        dim: k. 0: exact, nothing is projected, for small models and tests: B times the parameters' number in memory.
        layers: patterns (``fnmatch``) of layer names to tap; None: all that can be.
        by_part: a sketch for each part of the model (``model_parts.py``), of ``dim`` squared numbers each.
        strict: False: a layer that can't be followed is left out and handed to ``on_error``, instead of an error.
        on_error: called with (layer name, exception).

    Raises:
        ValueError: dim negative; by_part neither True nor False; a pattern that matches no layer (lists what there is);
            nothing trainable to tap.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int = 64,
        layers: Sequence[str] | None = None,
        *,
        by_part: bool = False,
        strict: bool = True,
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
            raise ValueError(f"dim={dim!r} must be a whole number, 0 (exact) or more")
        if layers is not None and (not isinstance(layers, list | tuple) or not all(isinstance(x, str) for x in layers)):
            raise ValueError(f"layers={layers!r} must be a list of patterns of layer names, or None")
        if not isinstance(by_part, bool):
            raise ValueError(f"by_part={by_part!r} must be True or False")
        self.dim, self.strict, self._on_error = dim, strict, on_error
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameter_names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        self.layers = find_layers(model, self._numbers, layers)
        self._by_module = {layer.module: layer for layer in self.layers}
        blocks = [block_of(layer.name) for layer in self.layers]
        n_blocks = max((block + 1 for block in blocks if block is not None), default=0)
        for layer in self.layers:
            layer.section = part_of(layer.name, layer.kind, n_blocks) if by_part else WHOLE
        known = {layer.section for layer in self.layers}
        self.sections = [name for name in (WHOLE, *PARTS_OF_MODEL) if name in known]
        self._section_of = {n: layer.section for layer in self.layers for n in (layer.weight, layer.bias)}
        self._projections: Projections | None = None
        self._rows: SequenceRows | None = None
        self._checked = True  # whether these rows are of the gradient that is checked
        self._seen: list[SequenceRows] = []
        self._check: TapCheck | None = None
        self._right: set[int] = set()  # parameters that were found right
        self._opened = 0  # steps
        self._word_signs: dict[int, torch.Tensor] = {}  # of weights whose rows are words, for the check
        self._failed: set[str] = set()
        self._handles: list[Any] = []  # of the hooks, which are there while a step is open

    @property
    def tapped_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are followed."""
        layers = [layer for layer in self.layers if layer.name not in self._failed]
        numbers = {number for layer in layers for number in (layer.weight, layer.bias) if number is not None}
        return [self._parameters[number] for number in sorted(numbers)]

    def is_of(self, model: nn.Module) -> bool:
        """Whether the parameters of ``model`` that are trained now are those that were when the taps were set."""
        now = [(name, id(one)) for name, one in model.named_parameters() if one.requires_grad]
        return now == list(zip(self._parameter_names, map(id, self._parameters), strict=True))

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """All that were trainable when the taps were set."""
        return list(self._parameters)

    def close(self) -> None:
        """Takes the taps off, as the end of a step does."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- one step

    @contextmanager
    def step(self, seed: int) -> Iterator[list[StepSketch]]:
        """The taps are open; afterwards the list holds what they recorded. ``seed`` draws the projections."""
        recorded: list[StepSketch] = []
        self.open(seed)
        try:
            yield recorded
            recorded.append(self.take())
        finally:
            if self._projections is not None:
                self.abandon()

    def open(self, seed: int) -> None:
        """Begins a step; ``take`` ends it."""
        if self._projections is not None:
            raise ValueError("a step is open already")
        device = self._parameters[0].device
        shapes = [whole_shape(parameter) for parameter in self._parameters]
        self._projections = Projections(self.dim, seed, device, shapes)
        self._seen, self._rows, self._checked = [], None, True
        self._check, self._word_signs = TapCheck(device), {}
        self._opened += 1
        self._handles = [layer.module.register_forward_hook(self._hook) for layer in self.layers]

    def abandon(self) -> None:
        """Ends a step, if one is open, and forgets it."""
        self._projections, self._rows, self._seen = None, None, []
        self._check, self._word_signs = None, {}
        self.close()

    def set_rows(
        self, prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None = None, *, checked: bool = True
    ) -> None:
        """From here on the forward and backward passes are of these rows.

        Args:
            prompt_S: (S,) integers, the prompt of each of the micro-batch's sequences.
            sequence_RT: where a row isn't a sequence: (R, T), each position's sequence in [0, S), -1 for none.
            checked: False: of a pass that the step's gradient isn't made of, so that ``leave_out_wrong`` ignores it.
        """
        if self._projections is None:
            raise ValueError("rows are told outside a step: open one first")
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
        self._fold()  # what the micro-batch before has added up
        n_rows = len(prompt_S) if sequence_RT is None else len(sequence_RT)
        self._rows = SequenceRows(prompt_S.clone(), sequence_RT, n_rows)
        self._seen.append(self._rows)
        self._checked = checked

    def end_rows(self) -> None:
        """What follows is of no row: not recorded."""
        self._rows, self._checked = None, True

    @contextmanager
    def rows(self, prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None = None) -> Iterator[None]:
        """``set_rows`` around a forward and its backward."""
        self.set_rows(prompt_S, sequence_RT)
        try:
            yield
        finally:
            self.end_rows()

    def leave_out_wrong(
        self,
        gradients: Sequence[torch.Tensor | GradientPart | None],
        *,
        rehearsal: bool = False,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
        processes: int = 1,
    ) -> dict[str, float]:
        """Compares what a step saw of each followed parameter with its gradient (``tap_check.py``), until the next one
        is opened; what differs isn't followed from here on.

        Args:
            gradients: of ``trainable_parameters``, over the whole step, the mean over ``processes``: whole, the same
                on all of them, or the part that this one has; None where there is none, or none to be had. Asked for
                one by one, and not all in every step.
            rehearsal: what is right here may not be so in training, which may call other parts (the fused head).
            reduce: the sum of a tensor over processes.

        Returns:
            The relative error of each parameter that is left out now, by its name; what the step recorded holds it.

        Raises:
            ValueError: no step was opened; gradients not as many, or not of the shapes, as the trainable parameters.
        """
        if self._check is None:
            raise ValueError("no step was opened")
        if len(gradients) != len(self._parameters):
            raise ValueError(f"got {len(gradients)} gradients for {len(self._parameters)} trainable parameters")
        names = self._names(failed=True)  # what failed on one process alone is wrong on all
        due = sorted(number for number in names if self._due(number))
        for number in due:
            part, shape = gradients[number], whole_shape(self._parameters[number])
            if isinstance(part, torch.Tensor):
                if part.shape != shape:
                    name = self._parameter_names[number]
                    raise ValueError(f"the gradient of {name} is {tuple(part.shape)}, not {tuple(shape)}")
                part = GradientPart(part, copies=processes)
            self._check.expect(number, part, shape, self._word_signs.get(number))
        wrong, right = self._check.errors(due, reduce=reduce, processes=processes)
        if not rehearsal:
            self._right.update(right)
        for layer in self.layers:
            layer.weight = None if layer.weight in wrong else layer.weight
            layer.bias = None if layer.bias in wrong else layer.bias
        return {names[number]: error for number, error in wrong.items()}

    def _due(self, number: int) -> bool:
        """Whether this step checks the parameter: until it was found right once, then in every eighth step."""
        return self._checked and (number not in self._right or (self._opened + number) % CHECK_EVERY == 0)

    @property
    def untapped(self) -> list[str]:
        """Names of the trainable parameters that aren't followed."""
        followed = self._names()
        return [name for number, name in enumerate(self._parameter_names) if number not in followed]

    def _names(self, *, failed: bool = False) -> dict[int, str]:
        """Of the parameters that are followed; ``failed``: also of layers that couldn't be."""
        found: dict[int, str] = {}
        for layer in self.layers:
            for kind, number in (("weight", layer.weight), ("bias", layer.bias)):
                if number is not None and (failed or layer.name not in self._failed):
                    found.setdefault(number, f"{layer.name}.{kind}")
        return found

    def take(self) -> StepSketch:
        """Ends the step and returns what was recorded, the micro-batches' sequences one after the other."""
        if self._projections is None:
            raise ValueError("no step is open")
        self._fold()
        device = self._projections.device
        # the same on every process, whichever layers were used there
        keys: list[Any] = self.sections
        if not self.dim:  # parameters, those of a section after one another
            keys = sorted({key for rows in self._seen for key in rows.total})
            keys.sort(key=lambda number: self.sections.index(self._section_of[number]))
        of_rows = [
            [
                rows.total[key].flatten(1).to(device)
                if key in rows.total
                else torch.zeros(len(rows.prompt_S), self._size(key), device=device)
                for key in keys
            ]
            for rows in self._seen
        ]
        prompts = [rows.prompt_S.to(device) for rows in self._seen]
        empty = self._size(None)
        self._projections, self._rows, self._seen = None, None, []  # the check stays
        self.close()
        if not of_rows:
            raise ValueError("no rows were told in this step")
        prompt_B = torch.cat(prompts)
        if not keys:
            return StepSketch(torch.zeros(len(prompt_B), empty, device=device), prompt_B)
        columns = [torch.cat(of_key) for of_key in zip(*of_rows, strict=True)]
        del of_rows  # as much memory again
        if self.dim:
            columns = [column.view(len(column), PARTS, -1) for column in columns]
        sections: dict[str, slice] = {}
        first = 0
        for key, column in zip(keys, columns, strict=True):
            name, last = key if self.dim else self._section_of[key], first + column.shape[-1]
            sections[name] = slice(sections[name].start if name in sections else first, last)
            first = last
        return StepSketch(columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1), prompt_B, sections)

    def _fold(self) -> None:
        """Makes numbers of the sketch of the layers that were added up."""
        assert self._projections is not None
        for rows in self._seen:
            for (section, _), entries in rows.entries.items():
                rows.add(section, self._projections.fold_entries(entries))
            rows.entries.clear()

    def _size(self, key: Any) -> int:
        """The numbers of a sequence under this key, in an open step."""
        assert self._projections is not None
        return whole_shape(self._parameters[key]).numel() if isinstance(key, int) else PARTS * self._projections.slots

    # ---- what a layer adds

    def _hook(self, module, inputs, output):
        rows, layer = self._rows, self._by_module[module]
        if rows is None or not torch.is_grad_enabled() or layer.name in self._failed:
            return
        try:
            if not isinstance(output, torch.Tensor) or not inputs or not isinstance(inputs[0], torch.Tensor):
                raise TypeError(f"layer {layer.name!r} must take a tensor and return a tensor")
            if output.grad_fn is not None:
                tap(output, inputs[0], lambda gradient, kept: self._guarded(layer, rows, gradient, kept))
        except StopRecomputation:  # how checkpointing ends a recomputed forward, once the last tensor is saved
            raise
        except Exception as error:
            self._fail(layer, error)

    def _guarded(
        self, layer: Layer, rows: SequenceRows, gradient: torch.Tensor, kept: Callable[[], torch.Tensor]
    ) -> None:
        if layer.name in self._failed or self._projections is None or (layer.weight is None and layer.bias is None):
            return
        try:
            record = {"embedding": self._embedding, "norm": self._norm}.get(layer.kind, self._linear)
            record(layer, rows, gradient, kept())
        except Exception as error:
            self._fail(layer, error)

    def _linear(self, layer: Layer, rows: SequenceRows, gradient: torch.Tensor, a: torch.Tensor) -> None:
        d, a = rows.tokens(layer.name, gradient), rows.tokens(layer.name, a)
        self._add_linear(layer, rows, d, a)

    def _add_linear(self, layer: Layer, rows: SequenceRows, d: torch.Tensor, a: torch.Tensor) -> None:
        assert self._check is not None
        left, right = (a, d) if layer.kind == "transposed" else (d, a)
        self._note_precision(layer, d, a)
        if layer.weight is not None and self._due(layer.weight):
            signs = self._signs_of(layer, left.shape[-1]).to(left.dtype)
            self._check.outer(layer.weight, rows, left @ signs, right)
        if layer.weight is not None and not self.dim:
            rows.add(layer.weight, rows.outer(left, right))
        elif layer.weight is not None:
            assert self._projections is not None
            if layer.kind == "head":
                projected = left @ self._projections.vocabulary(left.shape[-1], layer.weight, left.dtype)
                folded = self._projections.split_vocabulary(projected)
            else:
                folded = self._projections.fold_side(left, "out", layer.weight)
            self._add_folded(layer, rows, folded, right)
        if layer.bias is not None:
            self._add_vector(layer, layer.bias, rows, rows.sums(d))

    def _add_folded(self, layer: Layer, rows: SequenceRows, left: torch.Tensor, right: torch.Tensor) -> None:
        """``left`` is folded already, for each part; ``right`` is of the weight's input side."""
        assert self._projections is not None and layer.weight is not None
        projections, weight = self._projections, layer.weight
        right = projections.fold_side(right, "in", weight)
        place = projections.place(weight, left.shape[-1], right.shape[-1])
        sides = ["in"] if layer.kind in ("head", "embedding") else ["out", "in"]  # words are projected

        def turn(sums: torch.Tensor) -> torch.Tensor:
            return projections.turn_narrow(sums, weight, sides)

        rows.add_outer(layer.section, left, right, projections.side, place, turn)

    def _embedding(self, layer: Layer, rows: SequenceRows, gradient: torch.Tensor, ids: torch.Tensor) -> None:
        d = rows.tokens(layer.name, gradient)
        self._note_precision(layer, d)
        ids = ids.reshape(d.shape[:2])
        embedding: Any = layer.module
        if type(embedding).forward is not nn.Embedding.forward:  # Gemma's, and whose else multiplies what it looks up
            scale = getattr(embedding, "embed_scale", 1.0)
            d = d * (scale.to(d.dtype) if isinstance(scale, torch.Tensor) else scale)
        n_words = embedding.num_embeddings
        if embedding.padding_idx is not None:  # that row gets no gradient
            d = d * (ids != embedding.padding_idx)[..., None]
        if layer.weight is None:
            return
        assert self._projections is not None and self._check is not None
        if self._due(layer.weight):
            self._check.outer(layer.weight, rows, self._signs_of(layer, n_words).to(d.dtype)[ids], d)
        if self.dim:
            words = self._projections.of_words(ids, n_words, layer.weight, d.dtype)
            self._add_folded(layer, rows, self._projections.split_vocabulary(words), d)
            return
        one_hot = torch.nn.functional.one_hot(ids, n_words).to(d.dtype)
        rows.add(layer.weight, rows.outer(one_hot, d))

    def _norm(self, layer: Layer, rows: SequenceRows, gradient: torch.Tensor, a: torch.Tensor) -> None:
        """A norm's output is linear in its weight: the slope is its output at weight 1 less that at weight 0."""
        d = rows.tokens(layer.name, gradient)
        self._note_precision(layer, d, a)
        slope = rows.tokens(layer.name, norm_at(layer.module, 1.0, a.float()))
        if not layer.zero_at_zero:
            slope = slope - rows.tokens(layer.name, norm_at(layer.module, 0.0, a.float()))
        if layer.weight is not None:
            self._add_vector(layer, layer.weight, rows, rows.sums(d.float() * slope.float()))
        if layer.bias is not None:
            self._add_vector(layer, layer.bias, rows, rows.sums(d))

    def _note_precision(self, layer: Layer, *operands: torch.Tensor) -> None:
        """Tells the check in what precision the layer's gradient is made: its products', and what it is kept in."""
        assert self._check is not None
        for number in (layer.weight, layer.bias):
            if number is not None:
                dtypes = (*(tensor.dtype for tensor in operands), self._parameters[number].dtype)
                if rounds_products(operands[0].device, *dtypes):
                    self._check.made_in_half(number)

    def _signs_of(self, layer: Layer, width: int) -> torch.Tensor:
        """(width, PROBES): by what the check projects the weight's left side. Where its rows are words, made from the
        sketch's own projection: of dL/dlogits in the fused head nothing else is known."""
        assert self._check is not None and self._projections is not None and layer.weight is not None
        if layer.kind not in ("head", "embedding") or not self.dim:
            return self._check.signs(width, 0)
        if layer.weight not in self._word_signs:
            words = self._projections.vocabulary(width, layer.weight, torch.float32)
            self._word_signs[layer.weight] = words @ self._check.signs(words.shape[1], 0, words)
        return self._word_signs[layer.weight]

    def _add_vector(self, layer: Layer, number: int, rows: SequenceRows, vector_SD: torch.Tensor) -> None:
        assert self._check is not None
        if self._due(number):
            self._check.vector(number, vector_SD)
        if not self.dim:
            rows.add(number, vector_SD)
            return
        assert self._projections is not None
        rows.add(layer.section, self._projections.fold_vector(vector_SD, number))

    # ---- the LM head, when a fused loss takes its place

    def head_sketch(self, head: nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor) -> HeadSketch | None:
        """What ``linear_grpo_loss`` and ``linear_logprob`` take as ``head_sketch`` in place of a tap on ``head``.

        Args:
            head: the layer whose weight they use.
            hidden_NH: the hidden states they are given.
            sequence_N: (N,) the sequence of each, in [0, S).
        """
        layer, rows = self._by_module.get(head), self._rows
        if layer is None or rows is None or layer.weight is None or not torch.is_grad_enabled():
            return None
        if layer.name in self._failed:
            return None
        projections, weight = self._projections, layer.weight
        if not self._parameters[weight].requires_grad:  # frozen since the taps were set
            return None
        multiplied = compute_dtype(hidden_NH)
        assert projections is not None
        flat = SequenceRows(rows.prompt_S, sequence_N[None], 1, rows.total, rows.entries)
        hidden = hidden_NH.detach()[None]

        def add(projected_NK: torch.Tensor) -> None:
            if self._projections is not projections or layer.name in self._failed or len(projected_NK) == 0:
                return
            try:
                assert self._check is not None
                if rounds_products(hidden.device, multiplied, self._parameters[weight].dtype):
                    self._check.made_in_half(weight)
                if not self.dim:
                    self._add_linear(layer, flat, projected_NK[None], hidden)
                else:
                    if self._due(weight):
                        self._signs_of(layer, n_words)
                        mix = self._check.signs(projected_NK.shape[-1], 0, projected_NK)
                        self._check.outer(weight, flat, projected_NK[None] @ mix, hidden.to(projected_NK.dtype))
                    self._add_folded(layer, flat, projections.split_vocabulary(projected_NK[None]), hidden)
            except Exception as error:
                self._fail(layer, error)

        n_words = whole_shape(self._parameters[weight])[0]
        projection = projections.vocabulary(n_words, weight, hidden_NH.dtype) if self.dim else None
        return HeadSketch(projection, add, on_error=lambda error: self._fail(layer, error))

    def _fail(self, layer: Layer, error: Exception) -> None:
        """A layer that can't be followed is left out from here on; raises where ``strict``."""
        if self.strict:
            raise error
        self._failed.add(layer.name)
        if self._on_error is not None:
            self._on_error(layer.name, error)
