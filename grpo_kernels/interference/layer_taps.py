"""Which layers of a model can be tapped, and the tap: the identity, whose backward sees gradient and input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


class Tap(torch.autograd.Function):
    """The identity; its backward shows the gradient, and the layer's input, to ``record``.

    The input goes through ``save_for_backward``, so that gradient checkpointing drops and recomputes it like any other
    activation: a closure over it would keep it alive.
    """

    @staticmethod
    def forward(ctx, output, layer_input, record):
        ctx.record = record
        ctx.save_for_backward(layer_input)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            ctx.record(gradient, ctx.saved_tensors[0])
        return gradient, None, None


@dataclass
class Layer:
    """A layer that can be tapped; ``weight`` and ``bias`` are the numbers of its trainable ones, None for others."""

    name: str
    module: nn.Module
    kind: str  # linear, head, embedding or norm
    weight: int | None
    bias: int | None


def find_layers(model: nn.Module, numbers: Mapping[int, int], patterns: Sequence[str] | None) -> list[Layer]:
    """The layers whose names match, of those that can be tapped; ``numbers`` of the trainable parameters, by ``id``.

    ``ValueError``: a pattern that matches no layer (lists what there is); nothing trainable to tap.
    """
    found = []
    find_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = find_output()
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
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif weight is not None and weight.ndim == 1 and "norm" in type(module).__name__.lower():
            kind = "norm"
        else:
            continue
        found.append(Layer(name, module, kind, trainable.get("weight"), trainable.get("bias")))
    if not found:
        raise ValueError("nothing to tap: the model has no trainable Linear, Embedding or norm layer")
    if patterns is None:
        return found
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in found):
            names = ", ".join(layer.name for layer in found[:20]) + (", ..." if len(found) > 20 else "")
            raise ValueError(f"layers={list(patterns)!r}: {pattern!r} matches none of the layers {names}")
    return [layer for layer in found if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
