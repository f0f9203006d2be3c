"""Curvature-aware GRPO for TRL: ``from trl_ext import CurvatureGRPOTrainer, CurvatureGRPOConfig``.

Names are imported when they are asked for (PEP 562), so that a command that needs neither torch nor TRL starts at once.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CurvatureGRPOConfig
    from .recorder.files import read_interference
    from .trainer import CurvatureGRPOTrainer

__all__ = ["CurvatureGRPOConfig", "CurvatureGRPOTrainer", "read_interference"]

_MODULES = {
    "CurvatureGRPOConfig": ".config",
    "CurvatureGRPOTrainer": ".trainer",
    "read_interference": ".recorder.files",
}

# Two messages of other libraries that read like a failure, and that no user can act on: TRL itself sets the deprecated
# name, and the kernel that bitsandbytes misses is an optional one of CPUs with AVX512-BF16.
warnings.filterwarnings(
    "ignore", r"`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning, module="transformers"
)
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


def __getattr__(name: str) -> Any:
    """Raises ``ImportError`` where an installed TRL isn't one whose internals these classes override."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "read_interference":
        from ._version_check import check_trl_version

        check_trl_version()
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
