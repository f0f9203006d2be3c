"""Decides whether a kernel runs in Triton or in plain torch, and whether it multiplies in half precision."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BACKENDS = ("torch", "triton")
HALF = (torch.bfloat16, torch.float16)
_forced: str | None = None
_forced_half: bool | None = None


def triton_can_run(device: torch.device) -> bool:
    """Returns whether Triton kernels run on this device: a GPU, or a CPU with TRITON_INTERPRET=1."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" or (interpreted and device.type == "cpu")


def choose_backend(device: torch.device) -> str:
    """Returns "triton" for CUDA and ROCm devices, and "torch" for all others, unless ``use_backend`` overrides it.

    Raises ``ValueError`` if ``use_backend("triton")`` is in force and Triton can't run on ``device``.
    """
    if _forced == "triton" and not triton_can_run(device):
        raise ValueError(
            f"the Triton backend was asked for on device {device}: it needs the triton package and a GPU, "
            "or TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    if _forced is not None:
        return _forced
    return "triton" if device.type == "cuda" and triton_can_run(device) else "torch"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs all calls in this context on the backend "torch" or "triton", instead of the device's default."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {BACKENDS}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def native_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether the device multiplies this half-precision dtype itself; if not, the head multiplies in float32.

    A GPU multiplies both dtypes. A CPU multiplies bfloat16 if it has instructions for it. On a CPU, float16 is always
    widened to float32: the few CPUs with instructions for it (AVX512-FP16) gain little (measured: with float32 the
    whole loss takes 1.02 to 1.35 times as long), and a float16 product overflows at 65504.
    """
    if _forced_half is not None:
        return _forced_half
    if device.type != "cpu":
        return True
    return dtype == torch.bfloat16 and _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    """Returns whether the CPU has instructions for bfloat16 products that oneDNN may use.

    On a CPU with AVX512 alone, oneDNN emulates bfloat16, which is 4.6 times slower than float32 (measured).
    ``ONEDNN_MAX_CPU_ISA`` may limit oneDNN to a lower instruction set than the CPU has.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit and limit not in ("ALL", "DEFAULT") and "BF16" not in limit and "FP16" not in limit and "AMX" not in limit:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rounds_products(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Returns whether products of operands of these dtypes are rounded to about half precision.

    That is so if one dtype is half precision, or if the device multiplies float32 in TF32 (10 bits) or in bfloat16
    (``torch.set_float32_matmul_precision``).
    """
    if any(dtype in HALF for dtype in dtypes):
        return True
    settings: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return settings.matmul.fp32_precision in ("tf32", "bf16")


@contextmanager
def assume_native_half(native: bool) -> Iterator[None]:
    """Makes ``native_half`` return ``native`` in this context, on every device. For tests."""
    global _forced_half
    before, _forced_half = _forced_half, native
    try:
        yield
    finally:
        _forced_half = before
