"""Reads how much memory of a device is free, and how much a computation takes at its peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """The memory of one device, in bytes."""

    def free(self) -> int:
        """Returns how much this process can still allocate."""
        ...

    def peak(self, run: Callable[[], None]) -> int:
        """Calls ``run``; returns how much it allocated at its peak, in addition to what was allocated before."""
        ...


class CudaMemory:
    """The memory of a GPU, as CUDA and torch's allocator count it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Returns what the device has free, plus what torch has reserved and doesn't use."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def peak(self, run: Callable[[], None]) -> int:
        """Calls ``run``; returns the rise of torch's allocations to their peak."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device) - before


def memory_of(device: torch.device) -> DeviceMemory | None:
    """Returns the memory of ``device``; None if it can't be read: the main memory is shared with other processes."""
    return CudaMemory(device) if device.type == "cuda" else None
