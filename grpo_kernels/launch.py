"""The one way into a Triton kernel: every tensor contiguous, all on one device, and that device current."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

# Options of the compiler that change digits, at what they are by default up to Triton 3.9 (3.10 turns fusion off)
DIGITS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, on inputs that a kernel reads one number after the other.

    ``arguments``: tensors, numbers, None, and NamedTuples of them. A tensor with gaps, or one that was expanded, is
    copied; but for the rows of a NamedTuple that has their ``stride``, which the kernel takes. What a kernel writes
    must be contiguous already. Raises ``ValueError`` where tensors are on several devices.
    """
    ready = [_contiguous(one) for one in arguments]
    devices = {tensor.device for tensor in _tensors(ready)}
    if len(devices) != 1:
        raise ValueError(f"a kernel's tensors are on {', '.join(sorted(map(str, devices)))}: expected one device")
    (device,) = devices
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # else it runs on the current one
        kernel[grid](*ready, **options, **DIGITS)


def _contiguous(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    if not isinstance(value, tuple):
        return value
    has_stride = hasattr(value, "stride")
    parts = (
        one if has_stride and isinstance(one, torch.Tensor) and one.ndim == 2 else _contiguous(one) for one in value
    )
    return type(value)(*parts)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
