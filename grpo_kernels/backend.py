"""The one place that decides whether a kernel runs in Triton or in plain torch, and in which dtype it multiplies."""

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
    """True where a Triton kernel can be launched on tensors of this device (a GPU, or any device interpreted)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" or (interpreted and device.type == "cpu")


def choose_backend(device: torch.device) -> str:
    """``"triton"`` on CUDA and ROCm devices, ``"torch"`` everywhere else; ``use_backend`` overrides it.

    Raises ``ValueError`` when ``use_backend("triton")`` is in force and Triton can't run on ``device``.
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
    """Runs the enclosed calls on ``"torch"`` or ``"triton"``, whatever the device would choose."""
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {BACKENDS}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def native_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this half-precision dtype are left to the device; otherwise the head makes them in float32.

    A GPU multiplies both dtypes. A CPU multiplies bfloat16 where it has instructions for it. float16 is always widened
    on a CPU: the few that have instructions for it (AVX512-FP16) gain at most a third over float32 (measured: float32
    takes 1.02 to 1.35 times as long for the whole loss), and a float16 product overflows at 65504.
    """
    if _forced_half is not None:
        return _forced_half
    if device.type != "cpu":
        return True
    return dtype == torch.bfloat16 and _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    """oneDNN also accepts bfloat16 on a CPU that has only AVX512, and emulates it there: measured, 4.6 times slower
    than float32. ``ONEDNN_MAX_CPU_ISA`` may name a lower instruction set than the CPU has."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit and limit not in ("ALL", "DEFAULT") and "BF16" not in limit and "FP16" not in limit and "AMX" not in limit:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rounds_products(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether products of operands of these dtypes have half precision's digits: one of them is half, or the device
    multiplies float32 in TF32 (10 bits) or bfloat16 (``torch.set_float32_matmul_precision``)."""
    if any(dtype in HALF for dtype in dtypes):
        return True
    settings: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return settings.matmul.fp32_precision in ("tf32", "bf16")


@contextmanager
def assume_native_half(native: bool) -> Iterator[None]:
    """For tests: within, ``native_half`` has this answer on every device."""
    global _forced_half
    before, _forced_half = _forced_half, native
    try:
        yield
    finally:
        _forced_half = before
