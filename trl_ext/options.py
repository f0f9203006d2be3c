"""The options that this project adds to TRL's: names, defaults and help. Imports neither torch nor TRL.

``CurvatureGRPOConfig`` inherits them and checks them; ``examples/math.py --help`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpo_kernels.normalize.methods import METHODS

MOST_ROUNDS = 4  # of resampling, by default
# what TRL's scale_rewards does, by our name
SCALE_REWARDS_METHOD = {"group": "std", "batch": "batch_std", "none": "mean"}

# heading -> options below it, as --help and the documentation group them
GROUPS = {
    "Normalisation (default: as TRL's)": ("normalization", "normalization_kwargs"),
    "Work": (
        *("fused_loss", "skip_zero_advantage", "share_prompts", "tokens_per_micro_batch"),
        *("resample_zero_variance", "resample_max_rounds", "resample_live_prompts"),
    ),
    "Interference": (
        *("interference_every", "interference_dim", "interference_layers", "interference_parts"),
        *("what_if", "what_if_dead"),
    ),
    "Safeguards": ("stop_on",),
}


@dataclass
class CurvatureOptions:
    """What ``CurvatureGRPOConfig`` has beyond TRL's ``GRPOConfig``; its docstring says what each means."""

    normalization: str | None = field(default=None, metadata={"help": f"{', '.join(METHODS)}."})
    normalization_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Its options as JSON: '{\"alpha\": 0.5}' for power."}
    )

    fused_loss: bool = field(default=True, metadata={"help": "Head, loss and gradients in one pass."})
    skip_zero_advantage: bool = field(default=True, metadata={"help": "Don't run what has no gradient."})

    share_prompts: bool = field(default=True, metadata={"help": "A prompt and its answers in one row."})
    tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "With share_prompts; default: as many as without."}
    )

    resample_zero_variance: bool = field(default=False, metadata={"help": "Other prompts for those of equal rewards."})
    resample_max_rounds: int = field(default=MOST_ROUNDS, metadata={"help": "Generations for them in a step, at most."})
    resample_live_prompts: int | None = field(
        default=None, metadata={"help": "Prompts with unequal rewards; default: all."}
    )

    interference_every: int = field(default=10, metadata={"help": "Log interference each n-th step; 0: never."})
    interference_dim: int = field(default=64, metadata={"help": "A gradient's sketch: n x n numbers; 0: exact."})
    interference_layers: list[str] | None = field(
        default=None, metadata={"help": "Patterns of layer names; default: all trained."}
    )
    interference_parts: bool = field(default=False, metadata={"help": "Also by part of the model."})
    what_if: list[str] | None = field(default=None, metadata={"help": "Normalisations to compare with; default: all."})
    what_if_dead: bool = field(default=False, metadata={"help": "Score what has no gradient for it too."})

    stop_on: str | None = field(default=None, metadata={"help": "A verdict that ends a run: critical, or warning."})
