"""Kernels for group-relative policy optimisation: tensors in, tensors out. Knows nothing of trainers or models."""

from grpo_kernels.head.linear_grpo_loss import GRPOLoss, linear_grpo_loss
from grpo_kernels.head.linear_logprob import linear_logprob
from grpo_kernels.normalize.methods import METHODS, check_normalization
from grpo_kernels.normalize.normalized import Normalized
from grpo_kernels.normalize.rewards import normalize_rewards, normalize_with_statistics

from .backend import use_backend

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
