"""Applies a trainer's patches to the user's model while the trainer uses it, and undoes them afterwards.

Outside of ``train``, ``evaluate`` and ``predict`` the model is unpatched: users can pickle it, copy it, give it to
another trainer, or train it again with this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

Apply = Callable[[], Callable[[], None]]  # applies a patch and returns a function that undoes it


class ModelPatches:
    """A list of patches, applied in the order in which they were added."""

    def __init__(self) -> None:
        self._patches: list[Apply] = []
        self._undo: ExitStack | None = None  # None while the patches aren't applied

    @property
    def active(self) -> bool:
        """Whether the patches are applied now."""
        return self._undo is not None

    def add(self, apply: Apply) -> None:
        """Adds a patch, and applies it at once if the others are applied now."""
        self._patches.append(apply)
        if self._undo is not None:
            self._undo.callback(apply())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Applies all patches on entry and undoes them on exit. A nested call does nothing."""
        if self._undo is not None:
            yield
            return
        with ExitStack() as self._undo:
            self._undo.callback(setattr, self, "_undo", None)
            for apply in self._patches:
                self._undo.callback(apply())
            yield


def keep_four_bit_layers_trainable(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking the weights of 4-bit layers.

    On CPUs with bf16 instructions bitsandbytes repacks the weights permanently at the first forward in eval mode
    (generation). Its product with a repacked weight has no gradient, so the model would silently not train.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
