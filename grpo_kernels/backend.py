"""The one place that decides whether a kernel runs in Triton or in plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("torch", "triton")
_forced: str | None = None


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
