"""What a trainer changes on a user's model: applied while the trainer uses it, undone afterwards.

Between calls of ``train``, ``evaluate`` and ``predict`` the model is as the user made it: it can be pickled, copied,
given to another trainer, or trained by this one again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

Apply = Callable[[], Callable[[], None]]  # changes something and returns what undoes it


class ModelPatches:
    """Patches in the order in which they were added. ``applied`` may be nested: the outermost one counts."""

    def __init__(self) -> None:
        self._patches: list[Apply] = []
        self._undo: ExitStack | None = None  # while they are applied

    @property
    def active(self) -> bool:
        """Whether they are applied now."""
        return self._undo is not None

    def add(self, apply: Apply) -> None:
        """Adds a patch, and applies it at once where the others are applied."""
        self._patches.append(apply)
        if self._undo is not None:
            self._undo.callback(apply())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, all patches are applied."""
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

    On CPUs with bf16 instructions it does so for good at the first forward in eval mode (generation), and its product
    with a repacked weight has no gradient: nothing would be trained, silently.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
