"""Large buffers. On a CPU a fresh buffer costs more than the arithmetic on it: the kernel gives it page by page."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch

LARGE = 4 << 20  # bytes
_kept = threading.local()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``, in 2 MiB pages for large buffers on Linux.

    A 100 MB tile is 25,000 pages of 4 KiB, each an interruption of the first product that writes there: measured, a
    quarter of the whole loss's time at V = 49152. Linux gives huge pages where they are asked for.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)  # keeps the pages alive


def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer for one call's tile, whose content is undefined. On a CPU each thread keeps it for its next call.

    (Held for good: at most ``TILE_BYTES`` of head/products.py. Fresh memory in each call, even in huge pages, took 8 to
    18 % of the whole loss's time at 512 tokens, V 49152. On a GPU torch's allocator keeps it.)
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    kept = getattr(_kept, "buffer", None)
    if kept is None or len(kept) < size:
        _kept.buffer = None  # freed before the larger one is taken
        kept = _kept.buffer = empty((size,), torch.uint8, device)
    return kept[:size].view(dtype).view(shape)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)`` into such a buffer."""
    return tensor if tensor.dtype == dtype else empty(tensor.shape, dtype, tensor.device).copy_(tensor)


def scaled(tensor: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(tensor * scale).to(dtype)`` in one pass, in place where the dtype stays."""
    if tensor.dtype == dtype:
        return tensor.mul_(scale)
    return torch.mul(tensor, scale, out=empty(tensor.shape, dtype, tensor.device))
