"""Kernels for group-relative policy optimisation: tensors in, tensors out. Knows nothing of trainers or models."""

from .backend import use_backend
from .linear_grpo_loss import GRPOLoss, linear_grpo_loss
from .linear_logprob import linear_logprob
from .methods import METHODS, check_normalization
from .normalize import Normalized, normalize_rewards, normalize_with_statistics

__all__ = [
    "METHODS",
    "GRPOLoss",
    "Normalized",
    "check_normalization",
    "linear_grpo_loss",
    "linear_logprob",
    "normalize_rewards",
    "normalize_with_statistics",
    "use_backend",
]
