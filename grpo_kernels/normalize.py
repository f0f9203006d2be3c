"""Normalisation: the rewards of each prompt's completions become advantages.

Shapes: P prompts, G completions of one prompt.

Every method is affine within a group, ``A = (r - centre) / scale``. Flow of this file: check the input, reduce the
batch where a method needs it, then one pass over the groups (`_normalize_torch`, or one launch of
``normalize_triton.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from .backend import choose_backend


@dataclass(frozen=True)
class Method:
    """What a normalisation subtracts from a reward and what it divides by, and the options it takes."""

    centre: str  # "zero", "group", "others" (leave one out) or "batch"
    scale: str  # "one", "group", "power" or "batch"
    formula: str
    source: str
    options: tuple[str, ...] = ()

    @property
    def needs_batch(self) -> bool:
        """Whether statistics of the whole batch, and not only of each group, come into it."""
        return "batch" in (self.centre, self.scale)


METHODS: dict[str, Method] = {
    "none": Method("zero", "one", "r", "REINFORCE"),
    "mean": Method("group", "one", "r - m", "Dr. GRPO, arXiv 2503.20783"),
    "batch_mean": Method("batch", "one", "r - mu", "REINFORCE with a batch baseline"),
    "loo": Method("others", "one", "r - mean of the others", "RLOO, arXiv 2402.14740"),
    "std": Method("group", "group", "(r - m) / (s + eps)", "GRPO, arXiv 2402.03300"),
    "batch_std": Method("group", "batch", "(r - m) / (std of all rewards + eps)", "Lite PPO, arXiv 2508.08221"),
    "global": Method("batch", "batch", "(r - mu) / (std of all rewards + eps)", "REINFORCE++, arXiv 2501.03262"),
    "power": Method("group", "power", "(r - m) / (s + eps)^alpha", "arXiv 2607.00152", ("alpha",)),
}
BATCH_STATISTICS = ("batch_mean", "batch_std")


def check_normalization(method: str, *, eps: float = 1e-4, **options: float) -> None:
    """Raises ``ValueError`` unless ``normalize_rewards`` would accept this method with these options."""
    if not isinstance(method, str) or method not in METHODS:
        near = get_close_matches(str(method), METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown normalization {method!r}: choose from {', '.join(METHODS)}.{hint}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps!r} must be a finite number that is not negative")
    allowed = METHODS[method].options
    for name in options:
        if name not in allowed:
            takes = f"takes eps and {', '.join(allowed)}" if allowed else "takes only eps"
            raise ValueError(f"normalization {method!r} has no option {name!r}: it {takes}")
    for name in allowed:
        if name not in options:
            raise ValueError(f"normalization {method!r} needs the option {name!r}")
    alpha = options.get("alpha", 1.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a number in [0, 1]")


def _check_rewards(rewards_PG: torch.Tensor) -> None:
    if not isinstance(rewards_PG, torch.Tensor) or not rewards_PG.is_floating_point():
        kind = rewards_PG.dtype if isinstance(rewards_PG, torch.Tensor) else type(rewards_PG).__name__
        raise ValueError(f"rewards_PG must be a floating-point tensor, got {kind}")
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] == 0:
        raise ValueError(
            f"rewards_PG has shape {tuple(rewards_PG.shape)}: expected (P, G), a row of at least one reward a prompt"
        )
    infinite = torch.isinf(rewards_PG)
    if infinite.any():
        row, column = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"rewards_PG[{row}, {column}] is {rewards_PG[row, column].item()}: rewards must be finite, "
            "or NaN for a completion that could not be scored"
        )


def masked_statistics(
    values: torch.Tensor, mask: torch.Tensor, dim: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and sample standard deviation (ddof=1) of the masked values over ``dim``, which is kept.

    Equal values give exactly themselves and exactly 0: the mean of eight times 0.1 isn't 0.1 in float32, and that
    residue over a tiny std would become a large advantage. Deviations are taken relative to the range, so that
    neither huge nor tiny values overflow or vanish when squared. An empty mask gives 0, 0, 0.
    """
    count = mask.sum(dim=dim, keepdim=True).to(values.dtype)
    high = torch.where(mask, values, -torch.inf).amax(dim=dim, keepdim=True)
    low = torch.where(mask, values, torch.inf).amin(dim=dim, keepdim=True)
    width = torch.where(count > 0, high - low, 0.0)
    offset = torch.where(count > 0, low, 0.0)
    safe_width = torch.where(width > 0, width, 1.0)

    relative = torch.where(mask, (values - offset) / safe_width, 0.0)  # in [0, 1]
    relative_mean = relative.sum(dim=dim, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(mask, relative - relative_mean, 0.0)
    variance = deviation.square().sum(dim=dim, keepdim=True) / (count - 1).clamp(min=1)
    mean = torch.where(width > 0, offset + width * relative_mean, offset)
    return count, mean, torch.where(width > 0, width * variance.sqrt(), 0.0)


def _batch_statistics(
    rewards_PG: torch.Tensor, context: Mapping[str, torch.Tensor | float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sample std of the whole batch, 0-d: from ``context`` where it has them, else from these rewards."""
    _, mean, std = masked_statistics(rewards_PG, ~rewards_PG.isnan(), dim=(0, 1))
    given = [
        rewards_PG.new_tensor(float(context[name])) if name in context else own.reshape(())
        for name, own in zip(BATCH_STATISTICS, (mean, std), strict=True)
    ]
    return given[0], given[1]


def _check_context(context: Mapping[str, torch.Tensor | float]) -> None:
    for name, value in context.items():
        if name not in BATCH_STATISTICS:
            raise ValueError(f"context has no entry {name!r}: it takes {', '.join(BATCH_STATISTICS)}")
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError, RuntimeError):
            finite = False
        if not finite or (name == "batch_std" and value < 0):
            sign = ", not negative" if name == "batch_std" else ""
            raise ValueError(f"context[{name!r}]={value!r} must be a finite number{sign}")


def _normalize_torch(
    rewards_PG: torch.Tensor,
    method: Method,
    eps: float,
    alpha: float,
    batch_mean: torch.Tensor,
    batch_std: torch.Tensor,
) -> torch.Tensor:
    scorable = ~rewards_PG.isnan()
    count, mean, std = masked_statistics(rewards_PG, scorable, dim=(1,))

    if method.centre == "zero":
        centered = rewards_PG
    elif method.centre == "batch":
        centered = rewards_PG - batch_mean
    else:
        centered = rewards_PG - mean
        if method.centre == "others":  # r - mean of the others = (r - m) * n / (n - 1)
            centered = centered * count / (count - 1).clamp(min=1)

    if method.scale == "group":
        scale = std + eps
    elif method.scale == "power":
        scale = (std + eps) ** alpha
    elif method.scale == "batch":
        scale = batch_std + eps
    else:
        scale = torch.ones_like(mean)
    # a scale of 0 (eps = 0, everything equal) has nothing above it but zeros
    advantages_PG = torch.where(scale > 0, centered / torch.where(scale > 0, scale, 1.0), 0.0)
    return torch.where(scorable, advantages_PG, 0.0)


def normalize_rewards(
    rewards_PG: torch.Tensor,
    method: str = "std",
    *,
    eps: float = 1e-4,
    context: Mapping[str, torch.Tensor | float] | None = None,
    **options: float,
) -> torch.Tensor:
    """Advantages of P groups of G rewards, ``A = (r - centre) / scale``.

    With m and s the mean and sample std (ddof=1) of a group, mu the mean of the batch::

        none        r                                   REINFORCE
        mean        r - m                               Dr. GRPO, arXiv 2503.20783
        batch_mean  r - mu
        loo         r - mean of the others              RLOO, arXiv 2402.14740
        std         (r - m) / (s + eps)                 GRPO, arXiv 2402.03300
        batch_std   (r - m) / (std of all + eps)        Lite PPO, arXiv 2508.08221
        global      (r - mu) / (std of all + eps)       REINFORCE++, arXiv 2501.03262
        power       (r - m) / (s + eps)^alpha           arXiv 2607.00152; alpha=0 is mean, alpha=1 is std

    The same in plain torch, for ``std``::

        m, s = rewards_PG.mean(1, keepdim=True), rewards_PG.std(1, keepdim=True)
        advantages_PG = (rewards_PG - m) / (s + eps)

    A group whose rewards are all equal gets exactly 0 from every method that subtracts the group's own mean. A NaN
    reward (a completion that could not be scored) is left out of all statistics and gets advantage 0; a group with
    fewer than two scorable completions has no spread and its ``mean``, ``loo``, ``std``, ``batch_std`` and ``power``
    advantages are 0.

    Args:
        rewards_PG: (P, G), any floating dtype. P may be 0. Half precision is computed in float32.
        method: one of ``METHODS``.
        eps: added to a standard deviation, in units of reward.
        context: statistics this call can't see. ``batch_mean`` and ``batch_std`` (numbers or 0-d tensors, of all
            scorable rewards of the batch, ddof=1) replace those of ``rewards_PG`` where a caller holds a part of it.
        options: ``alpha`` in [0, 1] for ``power``.

    Returns:
        (P, G) on the same device; float64 for float64 rewards, else float32.

    Raises:
        ValueError: unknown method, option or context entry, eps or alpha out of range, rewards that are not a
            floating-point matrix or hold an infinity (with its position).
    """
    check_normalization(method, eps=eps, **options)
    _check_rewards(rewards_PG)
    context = context or {}
    _check_context(context)

    alpha = float(options.get("alpha", 1.0))
    if method == "power" and alpha in (0.0, 1.0):  # exactly the two ends of the dial
        method = "std" if alpha else "mean"
    chosen = METHODS[method]
    rewards_PG = rewards_PG.to(torch.float64 if rewards_PG.dtype == torch.float64 else torch.float32)
    if rewards_PG.numel() == 0:
        return rewards_PG.clone()
    if chosen.needs_batch:
        batch_mean, batch_std = _batch_statistics(rewards_PG, context)
    else:
        batch_mean = batch_std = rewards_PG.new_zeros(())

    # Triton passes scalars as float32, so float64 rewards, a matter of tests, stay with torch on every device
    if rewards_PG.dtype == torch.float32 and choose_backend(rewards_PG.device) == "triton":
        from .normalize_triton import normalize_groups

        return normalize_groups(rewards_PG, chosen, eps, alpha, batch_mean, batch_std)
    return _normalize_torch(rewards_PG, chosen, eps, alpha, batch_mean, batch_std)
