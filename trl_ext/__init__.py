"""Curvature-aware GRPO for TRL: ``from trl_ext import CurvatureGRPOTrainer, CurvatureGRPOConfig``.

Names are imported when they are asked for (PEP 562), so that a command that needs neither torch nor TRL starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._quiet import drop_lines_nobody_can_act_on

if TYPE_CHECKING:
    from .config import CurvatureGRPOConfig
    from .recorder.files import read_interference
    from .trainer import CurvatureGRPOTrainer

__all__ = ["CurvatureGRPOConfig", "CurvatureGRPOTrainer", "read_interference"]

_MODULES = {
    "CurvatureGRPOConfig": ".config",
    "CurvatureGRPOTrainer": ".trainer",
    "read_interference": ".interference.files",
}

drop_lines_nobody_can_act_on()


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
