"""Which layers of a model can be tapped, and the tap, which sees the output's gradient and the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


class _Kept(torch.autograd.Function):
    """Holds a tensor as autograd holds an activation, and has no part in any gradient."""

    @staticmethod
    def forward(ctx, anchor, tensor):
        ctx.save_for_backward(tensor)
        return anchor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def tap(
    output: torch.Tensor, layer_input: torch.Tensor, record: Callable[[torch.Tensor, Callable[[], torch.Tensor]], None]
) -> None:
    """Calls ``record`` with the gradient of ``output`` when it is there, and a function that gives ``layer_input``.

    The forward's values stay those of the model, which may change them in place: the hook is on what made the output
    (of a view, on what made the tensor that is viewed: a change in place takes the view itself out of the graph). The
    input is kept as autograd keeps activations, so that gradient checkpointing drops and recomputes it: a closure over
    it would keep it alive.
    """
    kept = [_Kept.apply(torch.empty(0, requires_grad=True), layer_input)]
    base = output._base if output._is_view() else None
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    made = base if base is not None and whole and base.grad_fn is not None else output
    shape, place = output.shape, made.output_nr

    def see(gradients: tuple[torch.Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if kept and gradient is not None:  # a second backward through the same graph adds nothing
            holder = kept.pop()
            with torch.no_grad():
                record(gradient.reshape(shape), lambda: holder.grad_fn.saved_tensors[0])

    assert made.grad_fn is not None
    made.grad_fn.register_prehook(see)


@dataclass
class Layer:
    """A layer that can be tapped; ``weight`` and ``bias`` are the numbers of its trainable ones, None for others."""

    name: str
    module: nn.Module
    kind: str  # linear, transposed, head, embedding or norm
    weight: int | None
    bias: int | None
    zero_at_zero: bool = False  # a norm whose output is 0 where its weight is
    section: str = ""  # of the model, whose sketch it adds to


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Also where DeepSpeed's ZeRO-3 has taken the parameter apart and left an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def opened(module: Any) -> Any:
    """Returns the module that runs. PEFT's ``modules_to_save`` wraps a module and keeps a trained copy of it: this
    returns the active copy, or the original where adapters are disabled. Other modules are returned unchanged."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or not hasattr(module, "original_module"):
        return module
    active = [name for name in module.active_adapters if name in copies]
    return module.original_module if module.disable_adapters or not active else copies[active[0]]


def norm_at(norm: nn.Module, weight: float, values: torch.Tensor) -> torch.Tensor:
    """What a norm makes of ``values``, were all its weights this number, and its bias, if it has one, 0.

    By its forward without hooks, which may look after the parameters that this puts others in place of (DeepSpeed's).
    """
    zeros = torch.zeros(values.shape[-1], dtype=values.dtype, device=values.device)
    own = norm._parameters
    others = {name: None if parameter is None else zeros for name, parameter in own.items()}
    norm._parameters = {**others, "weight": zeros + weight}  # type: ignore[dict-item]
    try:
        return norm.forward(values)
    finally:
        norm._parameters = own


def is_zero_at_zero(norm: nn.Module, width: int, device: torch.device) -> bool:
    """Not so of Gemma's, which multiply by 1 + weight. Asked once, with one made-up token.

    Where that can't be asked the answer is no, which is always right and costs a call more: the tap makes the same
    call of what the layer really gets, and where that fails too the layer is named and left out.
    """
    values = torch.linspace(-1, 1, width, device=device)[None, None]
    try:
        with torch.no_grad():
            return not norm_at(norm, 0.0, values).any().item()
    except Exception:
        return False


def kinds_of(names: Sequence[str], most: int = 6) -> str:
    """The kinds of parameters among these names, numbers left out: ``ia3_l, mlp.gate.weight, ...``."""
    kinds = list(dict.fromkeys(".".join(p for p in name.split(".") if not p.isdigit())[-60:] for name in names))
    return ", ".join(kinds[:most]) + (", ..." if len(kinds) > most else "")


def find_layers(model: nn.Module, numbers: Mapping[int, int], patterns: Sequence[str] | None) -> list[Layer]:
    """The layers whose names match, of those that can be tapped; ``numbers`` of the trainable parameters, by ``id``.

    ``ValueError``: a pattern that matches no layer (lists what there is); nothing trainable to tap.
    """
    found = []
    find_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = opened(find_output())
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
        elif type(module).__name__ == "Conv1D" and weight is not None and len(whole_shape(weight)) == 2:
            kind = "transposed"  # GPT-2's Linear: its weight is (in, out)
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif weight is not None and len(whole_shape(weight)) == 1 and "norm" in type(module).__name__.lower():
            kind = "norm"
        else:
            continue
        zero = kind == "norm" and is_zero_at_zero(module, whole_shape(module.weight)[0], module.weight.device)
        found.append(Layer(name, module, kind, trainable.get("weight"), trainable.get("bias"), zero))
    if not found:
        others = [name for name, parameter in model.named_parameters() if id(parameter) in numbers]
        raise ValueError(
            "nothing to tap: the model has no trainable Linear, Embedding or norm layer"
            + (f", only {kinds_of(others)}" if others else "")
        )
    if patterns is None:
        return found
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in found):
            names = ", ".join(layer.name for layer in found[:20]) + (", ..." if len(found) > 20 else "")
            raise ValueError(f"layers={list(patterns)!r}: {pattern!r} matches none of the layers {names}")
    return [layer for layer in found if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
