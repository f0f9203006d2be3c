"""NaN in all memory that a call leaves uninitialised, the padding of kept buffers too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_kernels import memory
from grpo_kernels.head import products


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, ``torch.empty`` and its kind give NaN (for integers the largest number), and so do the head's buffers:
    a call that reads what it didn't write shows it."""
    real_empty, real_workspace = memory.empty, memory.workspace

    def empty(shape, dtype, device):
        return real_empty(shape, dtype, device).fill_(torch.nan)

    def workspace(shape, dtype, device):
        return real_workspace(shape, dtype, device).fill_(torch.nan)

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    memory.empty = products.empty = empty
    products.workspace = workspace
    try:
        yield
    finally:
        memory.empty = products.empty = real_empty
        products.workspace = real_workspace
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
