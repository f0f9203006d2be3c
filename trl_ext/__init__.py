"""Curvature-aware GRPO for TRL: ``from trl_ext import CurvatureGRPOTrainer, CurvatureGRPOConfig``."""

from ._version_check import check_trl_version

check_trl_version()

from trl_ext.interference.files import read_interference  # noqa: E402

from .config import CurvatureGRPOConfig  # noqa: E402
from .trainer import CurvatureGRPOTrainer  # noqa: E402

__all__ = ["CurvatureGRPOConfig", "CurvatureGRPOTrainer", "read_interference"]
