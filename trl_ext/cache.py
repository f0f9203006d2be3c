"""Where this package keeps what is costly to make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns ``$CURVATURE_GRPO_CACHE`` or ``~/.cache/curvature-grpo``, for made models and answers about TRL."""
    return Path(os.environ.get("CURVATURE_GRPO_CACHE") or Path.home() / ".cache" / "curvature-grpo")
