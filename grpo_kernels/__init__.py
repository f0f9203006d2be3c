"""Kernels for group-relative policy optimisation: tensors in, tensors out. Knows nothing of trainers or models."""

from .backend import use_backend
from .normalize import METHODS, check_normalization, normalize_rewards

__all__ = ["METHODS", "check_normalization", "normalize_rewards", "use_backend"]
