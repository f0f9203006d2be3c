"""Checkpoints only the first decoder layers; the others keep their activations, and the backward recomputes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer


def without_adapters(model: Any) -> Any:
    """Returns the model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> list[Any]:
    """Returns the decoder's layers that can be checkpointed one by one; none for models that aren't built so."""
    base = without_adapters(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


class CheckpointedLayers:
    """Limits TRL's gradient checkpointing to the first ``count`` decoder layers; None: to none, all are checkpointed.

    Raises:
        ValueError: the model can't checkpoint single layers.
    """

    def __init__(self, model: Any, count: int | None) -> None:
        self._others: list[Any] = []
        if count is None:
            return
        layers = decoder_layers(model)
        if not layers:
            name = type(without_adapters(model)).__name__
            raise ValueError(f"checkpoint_layers={count!r} must be None: {name} can't checkpoint single layers")
        self._others = layers[count:]

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Turns checkpointing of the other layers off in this context, in which a forward pass runs.

        The flags must be set for each forward: TRL sets those of all layers again after generating.
        """
        before = [layer.gradient_checkpointing for layer in self._others]
        for layer in self._others:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer, checkpointed in zip(self._others, before, strict=True):
                layer.gradient_checkpointing = checkpointed
