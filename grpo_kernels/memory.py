"""Allocates large buffers fast on a CPU, where the operating system maps a new buffer page by page."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch

LARGE = 4 << 20  # bytes
_kept = threading.local()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns an undefined tensor, like ``torch.empty``; large buffers on Linux CPUs use huge pages of 2 MiB.

    A 100 MB tile has 25,000 pages of 4 KiB, and the first product that writes to it takes a page fault for each. That
    took a quarter of the whole loss's time at V = 49152.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)  # keeps the pages alive


def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns an undefined buffer for the tile of one call. On a CPU each thread reuses its buffer in later calls.

    The buffer is never freed; it is at most ``TILE_BYTES`` of head/products.py. New memory in each call, even in huge
    pages, took 8 to 18 % of the whole loss's time at 512 tokens, V 49152. On a GPU torch's allocator caches memory.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    kept = getattr(_kept, "buffer", None)
    if kept is None or len(kept) < size:
        _kept.buffer = None  # frees the old buffer before the larger one is allocated
        kept = _kept.buffer = empty((size,), torch.uint8, device)
    return kept[:size].view(dtype).view(shape)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``tensor.to(dtype)``, in a buffer of ``empty``."""
    return tensor if tensor.dtype == dtype else empty(tensor.shape, dtype, tensor.device).copy_(tensor)


def scaled(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``(tensor * scale).to(dtype)``, computed in one pass, and in place if the dtype doesn't change."""
    if tensor.dtype == dtype:
        return tensor.mul_(scale)
    return torch.mul(tensor, scale, out=empty(tensor.shape, dtype, tensor.device))
