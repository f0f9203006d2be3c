"""Curvature-aware GRPO for TRL: ``from trl_ext import CurvatureGRPOTrainer, CurvatureGRPOConfig``.

Each name is imported at its first use (PEP 562), so that commands that need neither torch nor TRL start fast.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_kernels.recorder.files import read_interference

    from .attached_recorder import attach
    from .config import CurvatureGRPOConfig
    from .fused_async import fuse_head
    from .trainer import CurvatureGRPOTrainer

__all__ = ["CurvatureGRPOConfig", "CurvatureGRPOTrainer", "attach", "fuse_head", "read_interference"]

_MODULES = {
    "CurvatureGRPOConfig": ".config",
    "CurvatureGRPOTrainer": ".trainer",
    "attach": ".attached_recorder",
    "fuse_head": ".fused_async",
    "read_interference": "grpo_kernels.recorder.files",
}

# Hides two messages of other libraries that look like errors and that users can't act on: TRL itself sets the
# deprecated name, and bitsandbytes misses an optional kernel for CPUs with AVX512-BF16.
warnings.filterwarnings(
    "ignore", r"`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning, module="transformers"
)
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use. Raises ``ImportError`` if the installed TRL isn't a supported one."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "read_interference":
        from ._version_check import check_trl_version

        check_trl_version()
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
