"""Kernels, interpreted, on guarded memory: a launch that reads or writes outside its tensors is an error.

Before each launch every tensor moves to memory of its own, where all bytes around it are 0xFF: NaN, or -1. So are the
gaps between the rows of a tile and the padding of its rows. Every address that isn't masked must be one of the tensors'
own numbers, or of the padding up to ``n_padded``, which kernels may read (triton_rows.py); and so must be what changed.
"""

import ctypes

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from triton.runtime.interpreter import InterpreterBuilder

from grpo_kernels import launch as launching
from grpo_kernels.head.rows import triton_rows
from grpo_kernels.head.rows.triton_rows import Gradient, Tile
from grpo_kernels.normalize import triton_groups

MARGIN = 4096
POISON = 0xFF


class OutOfBounds(AssertionError):  # noqa: N818
    pass


def bytes_at(address, count):
    return np.ctypeslib.as_array((ctypes.c_ubyte * int(count)).from_address(int(address)))


def intervals(tensor, width=None):
    """(rows, 2) first and last + 1 address of each row of numbers, of ``width`` numbers if that is given."""
    if tensor.numel() == 0:
        return np.empty((0, 2), dtype=np.int64)
    rows, numbers, stride = 1, tensor.numel(), 0
    if tensor.ndim == 2 and (width is not None or not tensor.is_contiguous()):
        rows, numbers, stride = len(tensor), width or tensor.shape[1], tensor.stride(0)
    else:
        assert tensor.is_contiguous(), "a kernel takes no gaps but between rows"
    starts = tensor.data_ptr() + np.arange(rows) * stride * tensor.itemsize
    return np.stack([starts, starts + numbers * tensor.itemsize], axis=1)


class Guarded:
    """The tensors of one launch, moved."""

    def __init__(self, arguments):
        nodes = [one for one in arguments if isinstance(one, Tile | Gradient)]
        width = next((one.n_padded for one in nodes if isinstance(one, Tile)), None)
        padded = {id(one[0]) for one in nodes}  # products, rows
        tensors = {id(one): one for one in tree_flatten(arguments)[0] if isinstance(one, torch.Tensor)}
        allowed = {key: intervals(one, width if key in padded else None) for key, one in tensors.items()}
        self.blocks = []  # (where it was, where it is, bytes), the buffer
        for low, high in self._merged(allowed.values()):
            buffer = torch.full((high - low + 2 * MARGIN + 64,), POISON, dtype=torch.uint8)
            start = buffer.data_ptr() + MARGIN
            start += (low - start) % 64  # aligned as it was
            self.blocks.append((low, start, high - low, buffer))
        self.own = [self._moved(intervals(one)) for one in tensors.values()]
        self.original = [intervals(one) for one in tensors.values()]
        for was, now in zip(self.original, self.own, strict=True):
            for (low, high), (start, _) in zip(was, now, strict=True):
                bytes_at(start, high - low)[:] = bytes_at(low, high - low)
        every = np.concatenate([self._moved(one) for one in allowed.values()])
        every = every[np.argsort(every[:, 0])]
        self.starts, self.ends = every[:, 0], np.maximum.accumulate(every[:, 1])
        self.arguments = tree_map_only(torch.Tensor, self._move, arguments)

    @staticmethod
    def _merged(groups):
        """Extents in memory, those that overlap as one: a gradient may lie in the bytes of its tile."""
        merged = []
        for low, high in sorted((int(one[0, 0]), int(one[-1, 1])) for one in groups if len(one)):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        return merged

    def _block(self, address):
        return next(block for block in self.blocks if block[0] <= address < block[0] + block[2])

    def _moved(self, found):
        if len(found) == 0:
            return found
        low, start, *_ = self._block(found[0, 0])
        return found - low + start

    def _move(self, tensor):
        if tensor.numel() == 0:
            return tensor
        low, start, _, buffer = self._block(tensor.data_ptr())
        offset = tensor.data_ptr() - low + start - buffer.data_ptr()
        rest = buffer[offset : offset + (len(buffer) - offset) // tensor.itemsize * tensor.itemsize]
        return rest.view(tensor.dtype).as_strided(
            tensor.shape, tensor.stride(), rest.storage_offset() // tensor.itemsize
        )

    def check(self, what, pointers, mask, size):
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        addresses = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)].astype(np.int64)
        place = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (place >= 0) & (addresses + size <= self.ends[np.maximum(place, 0)])
        if not inside.all():
            beyond = int(addresses[~inside][0] - self.starts[max(place[~inside][0], 0)])
            raise OutOfBounds(f"{what} at byte {beyond} from a tensor's row, outside of it")

    def finish(self):
        """Back to where it was; poison must still be poison."""
        for was, now in zip(self.original, self.own, strict=True):
            for (low, high), (start, _) in zip(was, now, strict=True):
                bytes_at(low, high - low)[:] = bytes_at(start, high - low)
        for start, end in zip(self.starts, self.ends, strict=True):
            bytes_at(start, end - start)[:] = POISON
        for *_, buffer in self.blocks:
            if not bool((buffer == POISON).all()):
                raise OutOfBounds("bytes outside a tensor were written")


def guard(monkeypatch):
    """Every launch is guarded from here on. Returns (``launch``, the names of the kernels that were launched)."""
    names, current = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self, ptrs, mask, *rest):
        current[-1].check("a load", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        current[-1].check("a store", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest)

    class OnGuardedMemory:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*arguments, **named):
                guarded = Guarded(arguments)
                current.append(guarded)
                names.append(self.kernel.fn.__name__)
                self.kernel[grid](*guarded.arguments, **named)
                guarded.finish()

            return run

    def launch(kernel, grid, *arguments, **named):
        launching.launch(OnGuardedMemory(kernel), grid, *arguments, **named)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    monkeypatch.setattr(triton_rows, "launch", launch)
    monkeypatch.setattr(triton_groups, "launch", launch)
    return launch, names
