"""Launches Triton kernels: makes every tensor contiguous, checks that all are on one device, and selects it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

# Compiler options that change rounding. These are the defaults up to Triton 3.9; 3.10 turns fusion off.
ROUNDING_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs ``kernel[grid](*arguments, **options)`` with contiguous inputs, on the tensors' device.

    Args:
        arguments: tensors, numbers, None, and NamedTuples of them. A tensor that isn't contiguous is copied, except a
            matrix in a NamedTuple with a field ``stride``, which the kernel uses. A tensor that the kernel writes to
            must be contiguous already.

    Raises:
        ValueError: the tensors are on several devices.
    """
    ready = [_contiguous(argument) for argument in arguments]
    devices = {tensor.device for tensor in _tensors(ready)}
    if len(devices) != 1:
        raise ValueError(f"a kernel's tensors are on {', '.join(sorted(map(str, devices)))}: expected one device")
    (device,) = devices
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton runs on the current device
        kernel[grid](*ready, **options, **ROUNDING_OPTIONS)


def _contiguous(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    if not isinstance(value, tuple):
        return value
    has_stride = hasattr(value, "stride")
    fields = (
        field if has_stride and isinstance(field, torch.Tensor) and field.ndim == 2 else _contiguous(field)
        for field in value
    )
    return type(value)(*fields)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
