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
from torch.utils.hooks import RemovableHandle

from grpo_kernels.head.products import HeadSketch

from .layer_sums import LayerSums, head_rows, rows_of
from .layer_taps import Layer, find_layers, tap, whole_shape
from .model_parts import PARTS_OF_MODEL, block_of, part_of
from .projections import IdentityProjection, Projections
from .tap_check import GradientPart, TapCheck

StopRecomputation: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())
CHECK_EVERY = 8  # steps, of a parameter that was found right before
WHOLE = "model"  # the only section, unless by parts


@dataclass(frozen=True)
class StepSketch:
    """One step's sequences: ``sketch`` (B, parts, numbers), float32, and ``prompt_B``.

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
        self._section_of = {
            n: layer.section for layer in self.layers for n in (layer.weight, layer.bias) if n is not None
        }
        self._sums: LayerSums | None = None  # of the step that is open
        self._check: TapCheck | None = None  # of the latest step
        self._right: set[int] = set()  # parameters that were found right
        self._opened = 0  # steps
        self._failed: set[str] = set()
        self._handles: list[RemovableHandle] = []  # of the hooks, which are there while a step is open

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
            if self._sums is not None:
                self.abandon()

    def open(self, seed: int) -> None:
        """Begins a step; ``take`` ends it."""
        if self._sums is not None:
            raise ValueError("a step is open already")
        device, shapes = self._parameters[0].device, [whole_shape(parameter) for parameter in self._parameters]
        projection = Projections(self.dim, seed, device, shapes) if self.dim else IdentityProjection(shapes)
        self._opened += 1
        self._check = TapCheck(device, self._due())
        self._sums = LayerSums(projection, self._check, self._parameters)
        self._handles = [layer.module.register_forward_hook(self._hook) for layer in self.layers]

    def _due(self) -> frozenset[int]:
        """The parameters that this step checks: until one was found right, then in every eighth step."""
        numbers = range(len(self._parameters))
        return frozenset(n for n in numbers if n not in self._right or (self._opened + n) % CHECK_EVERY == 0)

    def abandon(self) -> None:
        """Ends a step, if one is open, and forgets it."""
        self._sums = self._check = None
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
        if self._sums is None:
            raise ValueError("rows are told outside a step: open one first")
        self._sums.begin(rows_of(prompt_S, sequence_RT, checked))

    def end_rows(self) -> None:
        """What follows is of no row: not recorded."""
        if self._sums is not None:
            self._sums.rows = None

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
        due = sorted(number for number in names if number in self._check.due)
        for number in due:
            part, shape = gradients[number], whole_shape(self._parameters[number])
            if isinstance(part, torch.Tensor):
                if part.shape != shape:
                    name = self._parameter_names[number]
                    raise ValueError(f"the gradient of {name} is {tuple(part.shape)}, not {tuple(shape)}")
                part = GradientPart(part, copies=processes)
            self._check.expect(number, part, shape)
        wrong, right = self._check.errors(due, reduce=reduce, processes=processes)
        if not rehearsal:
            self._right.update(right)
        for layer in self.layers:
            layer.weight = None if layer.weight in wrong else layer.weight
            layer.bias = None if layer.bias in wrong else layer.bias
        return {names[number]: error for number, error in wrong.items()}

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
        if self._sums is None:
            raise ValueError("no step is open")
        sums, device = self._sums, self._parameters[0].device
        sums.finish()
        self._sums = None  # the check stays
        self.close()
        if not sums.seen:
            raise ValueError("no rows were told in this step")
        columns: list[torch.Tensor] = []
        sections: dict[str, slice] = {}
        first = 0
        for key, name in sums.projection.keys(self.sections, self._section_of):
            columns.append(sums.take(key, device))
            last = first + columns[-1].shape[-1]
            sections[name] = slice(sections[name].start if name in sections else first, last)
            first = last
        prompt_B = torch.cat([rows.prompt_S.to(device) for rows in sums.seen])
        return StepSketch(columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1), prompt_B, sections)

    # ---- what a layer adds

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        layer, sums = self._by_module[module], self._sums
        if sums is None or sums.rows is None or not torch.is_grad_enabled() or layer.name in self._failed:
            return
        rows = sums.rows

        def record(gradient: torch.Tensor, layer_input: Callable[[], torch.Tensor]) -> None:
            followed = layer.weight is not None or layer.bias is not None
            if self._sums is not sums or layer.name in self._failed or not followed:
                return
            try:
                sums.add(layer, rows, gradient, layer_input())
            except Exception as error:
                self._fail(layer, error)

        try:
            if not isinstance(output, torch.Tensor) or not inputs or not isinstance(inputs[0], torch.Tensor):
                raise TypeError(f"layer {layer.name!r} must take a tensor and return a tensor")
            if output.grad_fn is not None:
                tap(output, inputs[0], record)
        except StopRecomputation:  # how checkpointing ends a recomputed forward, once the last tensor is saved
            raise
        except Exception as error:
            self._fail(layer, error)

    def head_sketch(self, head: nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor) -> HeadSketch | None:
        """What ``linear_grpo_loss`` and ``linear_logprob`` take as ``head_sketch`` in place of a tap on ``head``.

        Args:
            head: the layer whose weight they use.
            hidden_NH: the hidden states they are given.
            sequence_N: (N,) the sequence of each, in [0, S).
        """
        layer, sums = self._by_module.get(head), self._sums
        if layer is None or sums is None or sums.rows is None or layer.weight is None or not torch.is_grad_enabled():
            return None
        parameter = self._parameters[layer.weight]
        if layer.name in self._failed or not parameter.requires_grad:  # frozen since the taps were set
            return None
        rows, hidden, n_words = head_rows(sums.rows, sequence_N), hidden_NH.detach(), whole_shape(parameter)[0]
        sums.note_head_precision(layer, hidden_NH)

        def add(projected_NK: torch.Tensor) -> None:
            if self._sums is not sums or layer.name in self._failed or len(projected_NK) == 0:
                return
            try:
                sums.add_head(layer, rows, projected_NK, hidden, n_words)
            except Exception as error:
                self._fail(layer, error)

        projection = sums.projection.vocabulary(n_words, layer.weight, hidden_NH.dtype)
        return HeadSketch(projection, add, on_error=lambda error: self._fail(layer, error))

    def _fail(self, layer: Layer, error: Exception) -> None:
        """A layer that can't be followed is left out from here on; raises where ``strict``."""
        if self.strict:
            raise error
        self._failed.add(layer.name)
        if self._on_error is not None:
            self._on_error(layer.name, error)
