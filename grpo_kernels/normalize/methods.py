"""Lists the normalisations: what each subtracts from a reward, what it divides by, and its options.

In the formulas, r is a reward; m, s and n are mean, sample std (ddof=1) and number of its group's scorable rewards; mu
is the mean over the batch. ``rewards.py`` computes ``A = (r - centre) / scale``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from .functions import FUNCTIONS
from .method import Method, Option

__all__ = ["ALIASES", "METHODS", "SHARED_OPTIONS", "Method", "Option", "canonical", "check_normalization"]

# what every named method takes besides eps; ``shared_options.py`` applies them
SHARED_OPTIONS = {
    "clip": Option(0, float("inf"), open_start=True, open_end=True),
    "tolerance": Option(0, float("inf"), open_end=True),
    "keep_variance": Option(0, 1, open_start=True),
}


ALPHA = {"alpha": Option(0, 1)}
DECAY = {"decay": Option(0, 1, default=0.9, open_end=True)}

METHODS: dict[str, Method] = {
    "none": Method("zero", "one", "group", "r", "REINFORCE", zero_if_equal=False),
    "mean": Method("group", "one", "group", "r - m", "Dr. GRPO, arXiv 2503.20783"),
    "batch_mean": Method(
        "given", "one", "batch", "r - mu", "REINFORCE with a batch baseline", zero_if_equal=False
    ),
    "loo": Method("group", "others", "group", "r - mean of the others", "RLOO, arXiv 2402.14740"),
    "std": Method("group", "group", "group", "(r - m) / (s + eps)", "GRPO, arXiv 2402.03300"),
    "batch_std": Method(
        "group", "given", "batch", "(r - m) / (std of all rewards + eps)", "Lite PPO, arXiv 2508.08221"
    ),
    "global": Method(
        "given", "given", "batch", "(r - mu) / (std of all rewards + eps)", "REINFORCE++, arXiv 2501.03262",
        zero_if_equal=False,
    ),
    "power": Method("group", "power", "group", "(r - m) / (s + eps)^alpha", "arXiv 2607.00152", ALPHA),
    "mean_abs": Method(
        "group", "mean_abs", "group", "(r - m) / (mean of |r - m| + eps)", "DGPO's scale, arXiv 2601.20614"
    ),
    "median_mad": Method(
        "median", "mad", "group", "(r - median) / (median of |r - median| + eps)", "MC-GRPO, arXiv 2601.22582"
    ),
    "iqr": Method("median", "iqr", "group", "(r - median) / (Q75 - Q25 + eps)", "robust statistics"),
    "rank": Method(
        "group", "rank", "group", "mid-rank in the group, centred and scaled to [-1, 1]", "GOPO, arXiv 2602.03876"
    ),
    "max_rl": Method(
        "group", "mean", "group", "(r - m) / (m + eps)", "MaxRL, arXiv 2602.02710", unit_rewards=True
    ),
    "length_weighted": Method(
        "lengths", "one", "group", "r - sum(length r) / sum(length)", "OPO, arXiv 2505.23585", needs=("lengths",)
    ),
    "shrinkage": Method(
        "given", "given", "batch", "r - [(1 - lam) mean of the others + lam mean of the other prompts]",
        "JSPO, arXiv 2511.03710", zero_if_equal=False,
    ),
    "beta": Method(
        "group", "given", "batch", "(r - m) / Beta pdf at m, fitted to the batch's pass rates",
        "BNPO, arXiv 2506.02864", unit_rewards=True,
    ),
    "decoupled": Method(
        "given", "given", "batch", "each reward function by std, weighted sum, whitened over the batch",
        "GDPO, arXiv 2601.05242", needs=("function_rewards",), zero_if_equal=False,
    ),
    "running_std": Method(
        "group", "given", "state", "(r - m) / (sqrt(moving average of group variance) + eps)",
        "second-moment view of arXiv 2601.23135", DECAY, ("running_variance",),
    ),
    "curvature": Method(
        "group", "given", "state", "(r - m) / (measured curvature at this pass rate + eps)",
        "arXiv 2601.23135, measured instead of assumed", DECAY, ("curvature_scale",), unit_rewards=True,
    ),
    **FUNCTIONS,
}  # fmt: skip

# other names of the same advantages; a paper's loss aggregation, clipping or KL are other options
ALIASES = {
    "bnpo": "beta",
    "dr_grpo": "mean",
    "gdpo": "decoupled",
    "gopo": "rank",
    "grpo": "std",
    "jspo": "shrinkage",
    "lite_ppo": "batch_std",
    "maxrl": "max_rl",
    "opo": "length_weighted",
    "pkpo": "max_at_k",
    "reinforce": "none",
    "reinforce++": "global",
    "rloo": "loo",
}

REMOVED = {"adaptive": "it was never better than 'std'; use 'std', or 'max_rl' for hard prompts with verified rewards"}


def canonical(method: Any) -> Any:
    """Returns the name in ``METHODS`` for an alias, and anything else unchanged."""
    return ALIASES.get(method, method) if isinstance(method, str) else method


def option_or_default(method: str, options: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a method's option."""
    return options.get(name, METHODS[method].options[name].default)


def check_normalization(method: str | Callable[..., Any], *, eps: float = 1e-4, **options: Any) -> None:
    """Raises ``ValueError`` for a method or options that ``normalize_rewards`` doesn't accept."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps!r} must be a finite number that is not negative")
    if callable(method):
        _check_function(method, options)
        return
    method = canonical(method)
    if not isinstance(method, str) or method not in METHODS:
        if isinstance(method, str) and method in REMOVED:
            raise ValueError(f"normalization {method!r} was removed: {REMOVED[method]}")
        near = get_close_matches(str(method), [*METHODS, *ALIASES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown normalization {method!r}: choose from {', '.join(METHODS)} (or {', '.join(ALIASES)}), "
            f"or give a function.{hint}"
        )
    own = METHODS[method].options
    allowed = {**own, **SHARED_OPTIONS}
    for name, value in options.items():
        if name not in allowed:
            takes = f"takes {', '.join(['eps', *own])}, and as every method {', '.join(SHARED_OPTIONS)}"
            raise ValueError(f"normalization {method!r} has no option {name!r}: it {takes}")
        if not allowed[name].allows(value):
            raise ValueError(f"{name}={value!r} must be {allowed[name]}")
    for name, option in own.items():
        if name not in options and option.default is None:
            raise ValueError(f"normalization {method!r} needs the option {name!r}, {option}")


def _check_function(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(None, {}, **options)
    except (TypeError, ValueError) as error:
        arguments = ", ".join(["rewards_PG", "context", *(f"{name}={value!r}" for name, value in options.items())])
        raise ValueError(
            f"normalization {function_name(function)} can't be called with ({arguments}): {error}"
        ) from None


def function_name(function: Callable[..., Any]) -> str:
    """Returns the name of a user's function, for messages and logs."""
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)
