"""The options that this project adds to TRL's: names, defaults and help. Imports neither torch nor TRL.

``CurvatureGRPOConfig`` inherits them and checks them; ``examples/math.py --help`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpo_kernels.normalize.methods import METHODS

MOST_ROUNDS = 4  # of resampling, by default

# heading -> options below it, as --help and the documentation group them
GROUPS = {
    "Normalisation": ("normalization", "normalization_kwargs"),
    "Work": ("fused_loss", "skip_zero_advantage", "full_entropy"),
    "Resampling": ("resample_zero_variance", "resample_max_rounds", "resample_live_prompts"),
    "Interference": ("interference_every", "interference_dim", "interference_layers"),
}


@dataclass
class CurvatureOptions:
    """What ``CurvatureGRPOConfig`` has beyond TRL's ``GRPOConfig``; its docstring says what each means."""

    normalization: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(METHODS)}; default: as scale_rewards."},
    )
    normalization_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the normalization as a JSON object, such as '{\"alpha\": 0.5}' for power."},
    )

    fused_loss: bool = field(
        default=True, metadata={"help": "Loss and gradients in one pass over the LM head; false: TRL's own head."}
    )

    skip_zero_advantage: bool = field(
        default=True, metadata={"help": "Don't run sequences without a gradient, and regroup the others by length."}
    )
    full_entropy: bool = field(
        default=False, metadata={"help": "Log the entropy of skipped sequences too, at the price of a forward pass."}
    )

    resample_zero_variance: bool = field(
        default=False, metadata={"help": "Draw other prompts in place of those whose answers all got the same reward."}
    )
    resample_max_rounds: int = field(
        default=MOST_ROUNDS, metadata={"help": "Generations for other prompts in a step, at most."}
    )
    resample_live_prompts: int | None = field(
        default=None, metadata={"help": "How many prompts of a batch shall have different rewards; default: all."}
    )

    interference_every: int = field(
        default=10, metadata={"help": "Log how the prompts' gradients interfere every this many steps; 0: never."}
    )
    interference_dim: int = field(
        default=64, metadata={"help": "Gradients are sketched to the square of this many numbers; 0: exact."}
    )
    interference_layers: list[str] | None = field(
        default=None, metadata={"help": "Patterns of the layers to look at; default: all that are trained."}
    )
