"""Kernels for group-relative policy optimisation: tensors in, tensors out, independent of trainers and models.

Each name is imported at its first use (PEP 562), so that reading the list of methods doesn't import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import use_backend
    from .head.linear_grpo_loss import GRPOLoss, linear_grpo_loss
    from .head.linear_logprob import linear_logprob
    from .normalize.methods import METHODS, check_normalization
    from .normalize.normalized import Normalized
    from .normalize.rewards import normalize_rewards, normalize_with_statistics
    from .recorder.gradient_recorder import GradientRecorder

__all__ = [
    "METHODS",
    "GRPOLoss",
    "GradientRecorder",
    "Normalized",
    "check_normalization",
    "linear_grpo_loss",
    "linear_logprob",
    "normalize_rewards",
    "normalize_with_statistics",
    "use_backend",
]

_MODULES = {
    "METHODS": ".normalize.methods",
    "GRPOLoss": ".head.linear_grpo_loss",
    "GradientRecorder": ".recorder.gradient_recorder",
    "Normalized": ".normalize.normalized",
    "check_normalization": ".normalize.methods",
    "linear_grpo_loss": ".head.linear_grpo_loss",
    "linear_logprob": ".head.linear_logprob",
    "normalize_rewards": ".normalize.rewards",
    "normalize_with_statistics": ".normalize.rewards",
    "use_backend": ".backend",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
