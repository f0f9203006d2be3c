"""Finds the layers of a model that can be tapped, and taps them: a tap gets the output's gradient and the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


class _SavedInput(torch.autograd.Function):
    """Saves a tensor as autograd saves an activation, and contributes to no gradient."""

    @staticmethod
    def forward(ctx, anchor, tensor):
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Hook:
    """A forward hook that a copy of the model doesn't have: ``deepcopy``, ``pickle`` and ``torch.save`` empty it."""

    def __init__(self, call: Callable[[nn.Module, tuple[Any, ...], Any], None] | None = None) -> None:
        self._call = call

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._call is not None:
            self._call(module, inputs, output)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def tap(
    output: torch.Tensor, layer_input: torch.Tensor, record: Callable[[torch.Tensor, Callable[[], torch.Tensor]], None]
) -> None:
    """Calls ``record`` in the backward pass with the gradient of ``output``, and a function that returns the input.

    The hook is on the autograd node of the output, not on the tensor, so that the model may change the output in place.
    For a view it is on the node of the viewed tensor, because an in-place change replaces the view's own node. Autograd
    saves the input like an activation, so that gradient checkpointing can drop and recompute it; a closure over the
    input would keep it alive.
    """
    kept = [_SavedInput.apply(torch.empty(0, requires_grad=True), layer_input)]
    base = output._base if output._is_view() else None
    reshaped = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    hooked = base if base is not None and reshaped and base.grad_fn is not None else output
    shape, place = output.shape, hooked.output_nr

    def on_gradient(gradients: tuple[torch.Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if kept and gradient is not None:  # ignores a second backward through the same graph
            holder = kept.pop()
            with torch.no_grad():
                record(gradient.reshape(shape), lambda: holder.grad_fn.saved_tensors[0])

    assert hooked.grad_fn is not None
    hooked.grad_fn.register_prehook(on_gradient)


@dataclass
class Layer:
    """A layer that can be tapped.

    Attributes:
        kind: linear, transposed, head, embedding or norm.
        weight, bias: numbers of the trainable parameters; None for a frozen, missing or excluded one.
        zero_at_zero: whether a norm's output is 0 where its weight is 0.
        section: the part of the model whose sketch it adds to.
    """

    name: str
    module: nn.Module
    kind: str
    weight: int | None
    bias: int | None
    zero_at_zero: bool = False
    section: str = ""


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """Returns the parameter's full shape, also if DeepSpeed's ZeRO-3 has sharded it and left an empty tensor."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def active_module(module: Any) -> Any:
    """Returns the module that runs. PEFT's ``modules_to_save`` wraps a module and keeps a trained copy of it: this
    returns the active copy, or the original where adapters are disabled. Other modules are returned unchanged."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or not hasattr(module, "original_module"):
        return module
    active = [name for name in module.active_adapters if name in copies]
    return module.original_module if module.disable_adapters or not active else copies[active[0]]


def norm_output(norm: nn.Module, weight: float, values: torch.Tensor) -> torch.Tensor:
    """Returns the norm's output for ``values`` with every weight equal to ``weight`` and the bias 0.

    It calls ``forward`` without hooks: DeepSpeed's hooks would gather the parameters that this function replaces.
    """
    zeros = torch.zeros(values.shape[-1], dtype=values.dtype, device=values.device)
    own = norm._parameters
    others = {name: None if parameter is None else zeros for name, parameter in own.items()}
    norm._parameters = {**others, "weight": zeros + weight}  # type: ignore[dict-item]
    try:
        return norm.forward(values)
    finally:
        norm._parameters = own


def norm_options(layer: Layer) -> tuple[object, ...]:
    """Returns what two norms must share to have the same ``norm_output``: class, eps, and the like."""
    if layer.kind != "norm":
        return ()
    plain = [(name, value) for name, value in vars(layer.module).items() if isinstance(value, int | float | str)]
    return (
        type(layer.module),
        layer.zero_at_zero,
        *sorted((name, value) for name, value in plain if name != "training"),
    )


def is_zero_at_zero_weight(norm: nn.Module, width: int, device: torch.device) -> bool:
    """Returns whether the norm's output is 0 at weight 0, tested on one token. Gemma's norms multiply by 1 + weight.

    False if the test fails: that is always correct, and costs the tap one more call of the norm.
    """
    values = torch.linspace(-1, 1, width, device=device)[None, None]
    try:
        with torch.no_grad():
            return not norm_output(norm, 0.0, values).any().item()
    except Exception:
        return False


def parameter_kinds(names: Sequence[str], most: int = 6) -> str:
    """Summarises parameter names for a message, without block numbers: ``ia3_l, mlp.gate.weight, ...``."""
    kinds = list(dict.fromkeys(".".join(p for p in name.split(".") if not p.isdigit())[-60:] for name in names))
    return ", ".join(kinds[:most]) + (", ..." if len(kinds) > most else "")


def find_layers(model: nn.Module, numbers: Mapping[int, int], patterns: Sequence[str] | None) -> list[Layer]:
    """Returns the tappable layers whose names match a pattern.

    Args:
        numbers: the numbers of the trainable parameters, by ``id``.
        patterns: ``fnmatch`` patterns of layer names; None: every layer.

    Raises:
        ValueError: a pattern matches no layer, or no trainable layer can be tapped.
    """
    found = []
    find_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = active_module(find_output())
    words = [module.weight for module in (*model.modules(), output) if isinstance(module, nn.Embedding)]
    words += [output.weight] if isinstance(output, nn.Linear) else []
    of_words = {id(weight) for weight in words}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        trainable = {key: numbers.get(id(parameter)) for key, parameter in own.items()}
        if all(number is None for number in trainable.values()) or not set(own) <= {"weight", "bias"}:
            continue
        weight = own.get("weight")
        if isinstance(module, nn.Linear):
            # a head's rows are words, projected as an embedding's: their weights may be tied
            kind = "head" if id(module.weight) in of_words else "linear"
        elif type(module).__name__ == "Conv1D" and weight is not None and len(full_shape(weight)) == 2:
            kind = "transposed"  # GPT-2's Linear: its weight is (in, out)
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif weight is not None and len(full_shape(weight)) == 1 and "norm" in type(module).__name__.lower():
            kind = "norm"
        else:
            continue
        zero = kind == "norm" and is_zero_at_zero_weight(module, full_shape(module.weight)[0], module.weight.device)
        found.append(Layer(name, module, kind, trainable.get("weight"), trainable.get("bias"), zero))
    if not found:
        others = [name for name, parameter in model.named_parameters() if id(parameter) in numbers]
        raise ValueError(
            "nothing to tap: the model has no trainable Linear, Embedding or norm layer"
            + (f", only {parameter_kinds(others)}" if others else "")
        )
    if patterns is None:
        return found
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in found):
            names = ", ".join(layer.name for layer in found[:20]) + (", ..." if len(found) > 20 else "")
            raise ValueError(f"layers={list(patterns)!r}: {pattern!r} matches none of the layers {names}")
    return [layer for layer in found if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
