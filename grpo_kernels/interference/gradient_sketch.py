"""``GradientSketch`` taps a model's layers and sketches the gradient of each sequence, in any training loop.

Shapes: S sequences of a micro-batch, B of the step, R rows of a micro-batch, T positions, k the sketch's width.

A Linear layer's gradient is a sum over tokens, ``sum_t d_t a_t^T``, of the output's gradient d and the input a. A tap
(a pair of hooks) gets both in the backward pass, projects each sequence's sum on both sides, and adds it to that
sequence's k * k numbers (``projections.py``). The sketch is linear: it adds over tokens, layers, micro-batches, ranks.
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

from .layer_sums import LayerSums, head_token_rows, make_rows
from .layer_taps import Hook, Layer, find_layers, full_shape, tap
from .model_parts import PARTS_OF_MODEL, block_of, part_of
from .projections import IdentityProjection, Projections
from .tap_check import GradientShard, SignsKey, TapCheck

StopRecomputation: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())
CHECK_EVERY = 8  # steps between two checks of a parameter that passed one
MODEL = "model"  # the only section, unless ``by_part``


@dataclass(frozen=True)
class StepSketch:
    """The sketches of one step's sequences.

    Attributes:
        sketch: (B, M, K) float32, K numbers in each of M replicates.
        prompt_B: (B,) integers, the prompt of each sequence.
        sections: by part of the model, its slice of the K numbers. The parts' inner products sum to the model's.
    """

    sketch: torch.Tensor
    prompt_B: torch.Tensor
    sections: dict[str, slice] = field(default_factory=dict)

    def gram(self) -> torch.Tensor:
        """Returns the (B, B) float64 inner products of the per-sequence gradients."""
        flat = self.sketch.flatten(1).double()
        return flat @ flat.T


class GradientSketch:
    """Sketches each sequence's gradient in the steps for which it is opened::

        sketch = GradientSketch(model, dim=64)
        with sketch.step(seed=step) as recorded:
            for batch in micro_batches:
                with sketch.rows(batch["prompt_id"]):  # (R,), one for each row
                    loss_of(model(batch["input_ids"])).backward()
        gram_BB = recorded[0].gram()

    It adds hooks only while a step is open, and changes no forward or backward value. It taps trainable Linear layers
    (also GPT-2's transposed ones, and LoRA's A and B over frozen or 4-bit weights), Embedding layers, and norms whose
    output is linear in a weight vector and an optional bias. Tied weights share their projection.
    ``exclude_mismatches`` finds parameters whose recorded sum isn't their gradient.

    Gradient checkpointing (both kinds), autocast, DDP and FSDP2 work. ``torch.compile`` of the model doesn't, because a
    compiled module doesn't call hooks.

    Args:
        model: any torch module.
        dim: k. 0: it keeps exact gradients, which takes B times the model's memory: for small models and tests.
        layers: patterns (``fnmatch``) of layer names to tap; None: every layer that can be tapped.
        skip: names of parameters that aren't recorded.
        by_part: whether each part of the model (``model_parts.py``) gets a sketch of k * k numbers.
        on_error: called with (layer name, exception) if a layer can't be recorded, which the sketch then excludes.
            None: the exception is raised.

    Raises:
        ValueError: ``dim``, ``layers`` or ``skip`` has a wrong type or value, a pattern matches no layer (the message
            lists the layers), or no trainable layer can be tapped.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int = 64,
        layers: Sequence[str] | None = None,
        *,
        skip: Sequence[str] = (),
        by_part: bool = False,
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
            raise ValueError(f"dim={dim!r} must be a whole number, 0 (exact) or more")
        if layers is not None and (not isinstance(layers, list | tuple) or not all(isinstance(x, str) for x in layers)):
            raise ValueError(f"layers={layers!r} must be a list of patterns of layer names, or None")
        if not isinstance(by_part, bool):
            raise ValueError(f"by_part={by_part!r} must be True or False")
        self.dim, self._on_error = dim, on_error
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameter_names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._numbers = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        every_name = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has several
        if unknown := [name for name in skip if name not in every_name]:
            raise ValueError(f"skip={list(skip)!r}: the model has no parameter {unknown[0]!r}")
        skipped = {id(every_name[name]) for name in skip}
        numbers = {key: number for key, number in self._numbers.items() if key not in skipped}
        self.layers = find_layers(model, numbers, layers)
        self._by_module = {layer.module: layer for layer in self.layers}
        blocks = [block_of(layer.name) for layer in self.layers]
        n_blocks = max((block + 1 for block in blocks if block is not None), default=0)
        for layer in self.layers:
            layer.section = part_of(layer.name, layer.kind, n_blocks) if by_part else MODEL
        known = {layer.section for layer in self.layers}
        self.sections = [name for name in (MODEL, *PARTS_OF_MODEL) if name in known]
        self._section_of = {
            n: layer.section for layer in self.layers for n in (layer.weight, layer.bias) if n is not None
        }
        self._sums: LayerSums | None = None  # of the open step
        self._check: TapCheck | None = None  # of the latest step
        self._check_signs: dict[SignsKey, torch.Tensor] = {}
        self._verified: set[int] = set()  # parameters that passed a check
        self._n_steps = 0
        self._failed: set[str] = set()
        self._handles: list[RemovableHandle] = []  # hooks, while a step is open

    @property
    def tapped_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are recorded."""
        layers = [layer for layer in self.layers if layer.name not in self._failed]
        numbers = {number for layer in layers for number in (layer.weight, layer.bias) if number is not None}
        return [self._parameters[number] for number in sorted(numbers)]

    def matches(self, model: nn.Module) -> bool:
        """Returns whether the model's trainable parameters are still those of this sketch's construction."""
        now = [(name, id(one)) for name, one in model.named_parameters() if one.requires_grad]
        return now == list(zip(self._parameter_names, map(id, self._parameters), strict=True))

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters that were trainable at construction."""
        return list(self._parameters)

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- one step

    @contextmanager
    def step(self, seed: int) -> Iterator[list[StepSketch]]:
        """Records one step in this context; the list then holds its sketch. ``seed`` draws the projections."""
        recorded: list[StepSketch] = []
        self.open(seed)
        try:
            yield recorded
            recorded.append(self.take())
        finally:
            if self._sums is not None:
                self.abandon()

    def open(self, seed: int) -> None:
        """Begins a step, which ``take`` or ``abandon`` ends."""
        if self._sums is not None:
            raise ValueError("a step is open already")
        device, shapes = self._parameters[0].device, [full_shape(parameter) for parameter in self._parameters]
        words = frozenset(x.weight for x in self.layers if x.weight is not None and x.kind in ("head", "embedding"))
        projection = Projections(self.dim, seed, device, shapes, words) if self.dim else IdentityProjection(shapes)
        self._n_steps += 1
        self._check = TapCheck(device, self._due(), self._check_signs)
        self._sums = LayerSums(projection, self._check, self._parameters, self._fail)
        self._handles = [layer.module.register_forward_hook(Hook(self._hook)) for layer in self.layers]

    def _due(self) -> frozenset[int]:
        """Returns the parameters to check in this step: each until it passes, then every ``CHECK_EVERY`` steps."""
        numbers = range(len(self._parameters))
        return frozenset(n for n in numbers if n not in self._verified or (self._n_steps + n) % CHECK_EVERY == 0)

    def mute(self) -> None:
        """Drops the open step's sketches. The hooks stay until it ends: checkpointed layers must run as before."""
        if self._sums is not None:
            self._sums.mute()

    def abandon(self) -> None:
        """Ends the open step, if any, and drops its sketches."""
        self._sums = self._check = None
        self.close()

    def set_rows(
        self, prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None = None, *, checked: bool = True
    ) -> None:
        """Assigns the following forward and backward passes to these rows, until ``end_rows``.

        Args:
            prompt_S: (S,) integers, the prompt of each sequence.
            sequence_RT: (R, T) integers, each position's sequence in [0, S), -1 for none. None: row i is sequence i.
            checked: whether these passes contribute to ``.grad``, so that ``exclude_mismatches`` counts them.
        """
        if self._sums is None:
            raise ValueError("set_rows needs an open step: call open() first")
        self._sums.begin(make_rows(prompt_S, sequence_RT, checked))

    def end_rows(self) -> None:
        """Stops recording until the next ``set_rows``."""
        if self._sums is not None:
            self._sums.end()

    @contextmanager
    def rows(self, prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None = None) -> Iterator[None]:
        """Records the passes in this context: ``set_rows`` before, ``end_rows`` after."""
        self.set_rows(prompt_S, sequence_RT)
        try:
            yield
        finally:
            self.end_rows()

    def exclude_mismatches(
        self,
        gradients: Sequence[torch.Tensor | GradientShard | None],
        *,
        probe: bool = False,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
        processes: int = 1,
    ) -> dict[str, float]:
        """Compares each parameter's recorded sum with its gradient (``tap_check.py``), and stops recording mismatches.

        Call it after a step's last backward and before the next ``open``. The step's sketch still holds the mismatches.

        Args:
            gradients: one entry per ``trainable_parameters``, the step's gradient averaged over ``processes`` ranks: a
                full tensor that is equal on all ranks, this rank's shard, or None. Only the checked ones are read, in
                ascending order.
            probe: whether the step was a probe. A parameter that passes in a probe isn't trusted in training, which
                may call other code (the fused head).
            reduce: returns the sum of a tensor over ranks.
            processes: the number of ranks.

        Returns:
            The relative error of each newly excluded parameter, by name.

        Raises:
            ValueError: no step was opened, or the gradients' number or shapes differ from the parameters'.
        """
        if self._check is None:
            raise ValueError("no step was opened")
        if self._sums is not None:
            self._sums.finish()
        if len(gradients) != len(self._parameters):
            raise ValueError(f"got {len(gradients)} gradients for {len(self._parameters)} trainable parameters")
        names = self._names(failed=True)  # a layer that failed on one rank only is a mismatch on all
        due = sorted(number for number in names if number in self._check.due)
        for number in due:
            part, shape = gradients[number], full_shape(self._parameters[number])
            if isinstance(part, torch.Tensor):
                if part.shape != shape:
                    name = self._parameter_names[number]
                    raise ValueError(f"the gradient of {name} is {tuple(part.shape)}, not {tuple(shape)}")
                part = GradientShard(part, copies=processes)
            self._check.expect(number, part, shape)
        wrong, verified = self._check.errors(due, reduce=reduce, processes=processes)
        if not probe:
            self._verified.update(verified)
        for layer in self.layers:
            layer.weight = None if layer.weight in wrong else layer.weight
            layer.bias = None if layer.bias in wrong else layer.bias
        return {names[number]: error for number, error in wrong.items()}

    @property
    def untapped(self) -> list[str]:
        """Names of the trainable parameters that aren't recorded."""
        recorded = self._names()
        return [name for number, name in enumerate(self._parameter_names) if number not in recorded]

    def _names(self, *, failed: bool = False) -> dict[int, str]:
        """Returns the names of recorded parameters by number. ``failed``: whether to include layers that failed."""
        found: dict[int, str] = {}
        for layer in self.layers:
            for kind, number in (("weight", layer.weight), ("bias", layer.bias)):
                if number is not None and (failed or layer.name not in self._failed):
                    found.setdefault(number, f"{layer.name}.{kind}")
        return found

    @property
    def without_pass(self) -> list[int]:
        """The numbers of the open step's micro-batches for which no tapped layer ran."""
        return [] if self._sums is None else [i for i, rows in enumerate(self._sums.micro_batches) if not rows.ran]

    @property
    def ran_again(self) -> bool:
        """Whether a forward pass followed the backward pass of the same rows, in the open step."""
        return self._sums is not None and any(rows.ran_again for rows in self._sums.micro_batches)

    def take(self) -> StepSketch:
        """Ends the step and returns its sketch; the micro-batches' sequences follow each other in order."""
        if self._sums is None:
            raise ValueError("no step is open")
        sums, device = self._sums, self._parameters[0].device
        sums.finish()
        self._sums = None  # self._check stays for exclude_mismatches
        self.close()
        if not sums.micro_batches:
            raise ValueError("this step recorded no rows: call set_rows before each forward pass")
        columns: list[torch.Tensor] = []
        sections: dict[str, slice] = {}
        first = 0
        for key, name in sums.projection.keys(self.sections, self._section_of):
            columns.append(sums.take(key, device))
            last = first + columns[-1].shape[-1]
            sections[name] = slice(sections[name].start if name in sections else first, last)
            first = last
        prompt_B = torch.cat([rows.prompt_S.to(device) for rows in sums.micro_batches])
        return StepSketch(columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1), prompt_B, sections)

    # ---- hooks

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        layer, sums = self._by_module[module], self._sums
        if sums is None or sums.rows is None or not torch.is_grad_enabled() or layer.name in self._failed:
            return
        rows = sums.rows
        recomputed = torch._C._current_graph_task_id() != -1  # within a backward pass
        rows.ran, rows.ran_again = True, rows.ran_again or (rows.returned and not recomputed)

        def record(gradient: torch.Tensor, layer_input: Callable[[], torch.Tensor]) -> None:
            rows.returned = True
            excluded = layer.weight is None and layer.bias is None
            if self._sums is not sums or layer.name in self._failed or excluded:
                return
            sums.late |= rows is not sums.rows
            try:
                if recomputed and sums.late:  # the recomputed pass may be that of earlier rows
                    raise RuntimeError("with use_reentrant=True, each backward must run before the next rows()")
                sums.add(layer, rows, gradient, layer_input())
            except Exception as error:
                self._fail(layer, error)

        try:
            if not isinstance(output, torch.Tensor) or not inputs or not isinstance(inputs[0], torch.Tensor):
                raise TypeError(f"layer {layer.name!r} must take a tensor and return a tensor")
            if output.grad_fn is not None:
                tap(output, inputs[0], record)
        except StopRecomputation:  # checkpointing ends a recomputed forward by this exception
            raise
        except Exception as error:
            self._fail(layer, error)

    def head_sketch(self, head: nn.Module, hidden_NH: torch.Tensor, sequence_N: torch.Tensor) -> HeadSketch | None:
        """Returns the argument ``head_sketch`` of ``linear_grpo_loss`` and ``linear_logprob``, in place of a tap.

        Those kernels never call the head's forward, so its hooks don't run. None: the head isn't recorded now.

        Args:
            head: the layer whose weight the kernel uses.
            hidden_NH: (N, H), the kernel's hidden states.
            sequence_N: (N,) integers, the sequence of each token in [0, S).
        """
        layer, sums = self._by_module.get(head), self._sums
        if layer is None or sums is None or sums.rows is None or layer.weight is None or not torch.is_grad_enabled():
            return None
        parameter = self._parameters[layer.weight]
        if layer.name in self._failed or not parameter.requires_grad:  # frozen since construction
            return None
        rows, hidden, n_words = head_token_rows(sums.rows, sequence_N), hidden_NH.detach(), full_shape(parameter)[0]
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
        """Excludes a layer that can't be recorded; raises the error if there is no ``on_error``."""
        if self._on_error is None:
            raise error
        self._failed.add(layer.name)
        self._on_error(layer.name, error)
