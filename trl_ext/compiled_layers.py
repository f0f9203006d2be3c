"""Compiles each decoder layer by itself, for training forwards (``torch_compile``, ``compile_layers``).

The layers run uncompiled in generation, evaluation and scoring, and in steps that log interference, whose taps a
compiled layer wouldn't call. Packed rows are padded to a few sizes (``Sizes``), so that few shapes occur; a compiled
layer gets a packed row's layout as a table of lengths, because Dynamo would compile again for each ``PackedRows``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as autograd_config

from .checkpointed_layers import decoder_layers
from .compat import RunSettings
from .model_patches import Apply
from .probe_model import has_engine
from .sharing.hooks import ATTRIBUTE, NAME
from .sharing.operators import NotCompiled
from .sharing.packed_rows import KEYWORD, LENGTHS, LONGEST, PackedRows

COMPILED = "_curvature_grpo_compiled"  # attribute of a layer while a trainer uses it
MOST_SIZES, LEAST_TOKENS = 8, 64
VARIANTS = 64  # compilations of a layer's code at most; Dynamo's own limit of 8 is less than shapes times variants
EAGER_BACKWARD = "force_non_lazy_backward_lowering"
WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that use CUDA graphs
# Raised while compiling. Others, such as torch.OutOfMemoryError, come from running a layer.
COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)


class Sizes:
    """The sizes to which packed rows are padded.

    There are at most eight, unless rows that are longer than all earlier ones come after eight sizes are in use: then
    sizes double. A row has at most an eighth more tokens than it needs of the largest size, rounded up to a power of 2.
    """

    def __init__(self) -> None:
        self.used: list[int] = []

    def round_up(self, tokens: int) -> int:
        """Returns the size for a row of ``tokens`` tokens."""
        largest = 1 << (max([tokens, LEAST_TOKENS, *self.used]) - 1).bit_length()
        unit = max(largest // MOST_SIZES, LEAST_TOKENS)
        size = -(-tokens // unit) * unit
        full = len(self.used) >= MOST_SIZES
        fitting = [used for used in self.used if tokens <= used and (full or used <= size)]
        if fitting:
            return min(fitting)
        self.used.append(largest if full else size)
        return self.used[-1]


def forward(self, *args: Any, **kwargs: Any) -> Any:
    """Is a layer's forward while a trainer uses it. A copy of the layer lacks ``COMPILED`` and runs its own forward."""
    compiled = vars(self).get(COMPILED)
    if compiled is None or not compiled.runs(self, kwargs):
        return type(self).forward(self, *args, **kwargs)
    return compiled.run(self, args, kwargs)


class CompiledLayers:
    """Runs a model's decoder layers compiled, one compilation for all layers of a class.

    Args:
        run: the run's settings.
        model: the policy, without its engine's wrapper.

    Attributes:
        layers: the layers that will be compiled; empty if none are.
        configs: the configurations by which they find their attention.
    """

    def __init__(self, run: RunSettings, model: Any) -> None:
        self._log_once, self._on, self._sizes = run.log_once, False, Sizes()
        self._functions: dict[type, Callable[..., Any]] = {}
        self.layers: list[Any] = []
        if run.compilation is None:
            return
        layers = decoder_layers(model)
        reason = why_not_compiled(run, layers)
        if reason is not None:
            run.log_once(f"Layers aren't compiled: {reason}.")
            return
        self.layers, self._compilation = layers, run.compilation
        modules = [module for layer in layers for module in layer.modules()]
        self.configs = list({id(c): c for m in modules if hasattr(c := getattr(m, "config", None), ATTRIBUTE)}.values())

    def __deepcopy__(self, memo: Any) -> None:
        """Returns None: a copy of a model made in training doesn't have compiled layers."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as None, like a deep copy."""
        return type(None), ()

    def patches(self) -> list[Apply]:
        """Returns the patches (``model_patches.py``) of the layers."""
        return [partial(self._patch, layer) for layer in self.layers]

    def _patch(self, layer: Any) -> Callable[[], None]:
        before = {name: vars(layer)[name] for name in ("forward", COMPILED) if name in vars(layer)}
        layer.forward = types.MethodType(forward, layer)
        setattr(layer, COMPILED, self)

        def undo() -> None:
            for name in ("forward", COMPILED):
                delattr(layer, name)
            vars(layer).update(before)  # another trainer's

        return undo

    @contextmanager
    def allowed(self, allowed: bool) -> Iterator[None]:
        """Compiles the layers in the training forwards of this context, and in what its backwards recompute.

        ``allowed``: whether the layers may be compiled; False if taps are open.
        """
        if not allowed or not self.layers:
            yield
            return
        if self._compilation.mode in WITH_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        self._on = True
        try:
            with compiler_settings():
                yield
        finally:
            self._on = False

    def size_of(self, tokens: int) -> int:
        """Returns the size to which a packed row of ``tokens`` tokens is padded for the coming forward."""
        return self._sizes.round_up(tokens) if self._on and torch.is_grad_enabled() else tokens

    def runs(self, layer: Any, kwargs: Mapping[str, Any]) -> bool:
        """Returns whether this call of ``layer`` is to be compiled."""
        keeps_states = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        return self._on and layer.training and torch.is_grad_enabled() and not keeps_states

    def run(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs ``layer`` compiled, and checkpointed if it is to be."""
        call = _Call(self, layer)
        if checkpoints_in_forward(layer) and layer.gradient_checkpointing:
            return layer._gradient_checkpointing_func(partial(call, **kwargs), *args)
        return call(*args, **kwargs)

    def function(self, layer: Any) -> Callable[..., Any]:
        """Returns the compiled forward of the layer's class, which takes the layer."""
        kind = type(layer)
        if kind not in self._functions:
            how = self._compilation
            self._functions[kind] = torch.compile(plain_forward(kind), fullgraph=True, **how.arguments())
        return self._functions[kind]

    def give_up(self, error: Exception) -> None:
        """Runs all layers uncompiled from here on."""
        self._on, self.layers = False, []
        self._log_once(f"Layers aren't compiled from here on: {short_reason(error)}.")


class _Call:
    """A call of a layer. A checkpoint's second call runs as the first did: compiled or not."""

    def __init__(self, owner: CompiledLayers, layer: Any) -> None:
        self._owner, self._layer, self._compiled = owner, layer, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled:
            try:
                return self._run_compiled(args, kwargs)
            except COMPILE_ERRORS as error:
                self._owner.give_up(error)
                self._compiled = False
        return plain_forward(type(self._layer))(self._layer, *args, **kwargs)

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function, rows = self._owner.function(self._layer), kwargs.get(KEYWORD)
        with compiler_settings():  # a checkpoint on a GPU recomputes in autograd's thread, which lacks them
            if rows is None:
                return function(self._layer, *args, **kwargs)
            with our_attention(self._owner.configs):
                return function(self._layer, *args, **with_table(rows, kwargs))


def compiler_settings() -> AbstractContextManager[Any]:
    """Returns the context in which layers are compiled, of this thread; entering it again costs nothing."""
    if dynamo_config.recompile_limit == VARIANTS:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(dynamo_config.patch(recompile_limit=VARIANTS))
    # an error in compiling the backward must come up in the forward, where the layer can still run uncompiled
    if hasattr(autograd_config, EAGER_BACKWARD):  # an older torch may lack it
        stack.enter_context(autograd_config.patch({EAGER_BACKWARD: True}))
    return stack


def with_table(rows: PackedRows, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's arguments with the row's lengths in place of its ``PackedRows``."""
    others = {name: value for name, value in kwargs.items() if name != KEYWORD}
    return {**others, LENGTHS: rows.table(), LONGEST: rows.longest}


@contextmanager
def our_attention(configs: list[Any]) -> Iterator[None]:
    """Makes layers call our attention in this context. The hooks of ``sharing/hooks.py`` would be compiled too."""
    before = [(config, getattr(config, ATTRIBUTE)) for config in configs]
    try:
        for config, _ in before:
            setattr(config, ATTRIBUTE, NAME)
        yield
    finally:
        for config, name in before:
            setattr(config, ATTRIBUTE, name)


def short_reason(error: Exception) -> str:
    """Returns what our attention says in Dynamo's long error, or else what raised it and what that says."""
    text = str(error.__cause__ or error)
    ours = text.partition(f"{NotCompiled.__name__}(")[2].partition(")")[0].strip("'\"")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{ours} isn't compiled" if ours else f"{type(error).__name__}: {' '.join(lines[:2])}"


def checkpoints_in_forward(layer: Any) -> bool:
    """Returns whether the layer's class checkpoints in ``forward``. With an older transformers ``__call__`` does."""
    return type(layer).__call__ is torch.nn.Module.__call__


def plain_forward(kind: type) -> Callable[..., Any]:
    """Returns the forward of a layer's class without the wrapper that checkpoints it."""
    own: Any = kind.forward  # type: ignore[attr-defined]
    return own.__wrapped__ if kind.__call__ is torch.nn.Module.__call__ else own


def why_not_compiled(run: RunSettings, layers: list[Any]) -> str | None:
    """Returns why the layers can't be compiled, or None if they can."""
    if has_engine(run.accelerator):
        return f"that hasn't been tried with {run.accelerator.distributed_type.value}"
    if not layers:
        return "the model has no decoder layers that can be called one by one"
    if any("forward" in vars(layer) and COMPILED not in vars(layer) for layer in layers):
        return "the layers' forward is replaced already, as accelerate does to move weights between devices"
    return None
