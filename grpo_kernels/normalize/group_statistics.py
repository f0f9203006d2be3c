"""Computes each group's centre and scale in plain torch, from its scorable (not NaN) rewards.

Shapes: P prompts, G completions of one prompt.
"""

from __future__ import annotations

import torch

# A MAD or IQR below this share of the std doesn't describe the spread (often it is 0); the std replaces it.
ROBUST_FLOOR = 0.01


def masked_statistics(
    values: torch.Tensor, mask: torch.Tensor, dim: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns count, mean and sample std (ddof=1) of the masked values over ``dim``, which keeps size 1.

    Equal values give exactly their value and a std of exactly 0. (A plain mean of eight times 0.1 isn't 0.1 in float32,
    and the residue divided by a tiny std would be a large advantage.) Deviations are relative to the range, so that
    squares neither overflow nor underflow. An empty mask gives 0, 0, 0.
    """
    count = mask.sum(dim=dim, keepdim=True).to(values.dtype)
    offset, width = _offset_and_width(values, mask, dim)
    safe_width = torch.where(width > 0, width, 1.0)

    relative = torch.where(mask, (values - offset) / safe_width, 0.0)  # in [0, 1]
    relative_mean = relative.sum(dim=dim, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(mask, relative - relative_mean, 0.0)
    variance = deviation.square().sum(dim=dim, keepdim=True) / (count - 1).clamp(min=1)
    mean = torch.where(width > 0, offset + width * relative_mean, offset)
    return count, mean, torch.where(width > 0, width * variance.sqrt(), 0.0)


def _offset_and_width(values: torch.Tensor, mask: torch.Tensor, dim: tuple[int, ...]):
    """Returns the smallest masked value, and the largest minus the smallest; 0, 0 for an empty mask."""
    some = mask.any(dim=dim, keepdim=True) if len(dim) == 1 else mask.any()
    high = torch.where(mask, values, -torch.inf).amax(dim=dim, keepdim=True)
    low = torch.where(mask, values, torch.inf).amin(dim=dim, keepdim=True)
    return torch.where(some, low, 0.0), torch.where(some, high - low, 0.0)


def weighted_mean(values_PG: torch.Tensor, mask_PG: torch.Tensor, weights_PG: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean (P, 1) of the masked values; exactly their value if all are equal."""
    offset, width = _offset_and_width(values_PG, mask_PG, (1,))
    weights_PG = torch.where(mask_PG, weights_PG, 0.0)
    deviation = torch.where(mask_PG, values_PG - offset, 0.0)
    total = weights_PG.sum(1, keepdim=True)
    return torch.where(width > 0, offset + (weights_PG * deviation).sum(1, keepdim=True) / total, offset)


def masked_quantile(values_PG: torch.Tensor, mask_PG: torch.Tensor, q: float) -> torch.Tensor:
    """Returns the quantile (P, 1) of the masked values, interpolated like ``numpy.quantile``; 0 for an empty mask."""
    ordered = torch.where(mask_PG, values_PG, torch.inf).sort(dim=1).values
    last = (mask_PG.sum(1, keepdim=True) - 1).clamp(min=0)
    place = q * last.to(values_PG.dtype)
    below = place.floor().long()
    low = ordered.gather(1, below)
    high = ordered.gather(1, torch.minimum(below + 1, last))
    value = torch.where(high > low, low + (place - below) * (high - low), low)
    return torch.where(mask_PG.any(1, keepdim=True), value, 0.0)


def mid_ranks(values_PG: torch.Tensor, mask_PG: torch.Tensor) -> torch.Tensor:
    """Returns ranks 1 to n in each group; equal values get their mean rank (a double argsort would order them)."""
    ordered = torch.where(mask_PG, values_PG, torch.inf).sort(dim=1).values
    wanted = torch.where(mask_PG, values_PG, 0.0)
    below = torch.searchsorted(ordered, wanted, side="left")
    up_to = torch.searchsorted(ordered, wanted, side="right")
    return (below + up_to + 1).to(values_PG.dtype) / 2


def group_centre_and_scale(
    rewards_PG: torch.Tensor, centre: str, scale: str, eps: float, alpha: float, lengths_PG: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns centre and scale, (P, 1) each, by ``Method.centre`` and ``Method.scale``; 0 and 1 for ``given``."""
    first = rewards_PG[:, :1]
    if centre in ("zero", "given") and scale in ("one", "given"):
        return torch.zeros_like(first), torch.ones_like(first)
    scorable = ~rewards_PG.isnan()
    count, mean, std = masked_statistics(rewards_PG, scorable, dim=(1,))

    centre_P1 = torch.zeros_like(mean)
    if centre == "group":
        centre_P1 = mean
    elif centre == "median":
        centre_P1 = masked_quantile(rewards_PG, scorable, 0.5)
    elif centre == "lengths":
        assert lengths_PG is not None
        centre_P1 = weighted_mean(rewards_PG, scorable, lengths_PG)

    scale_P1 = torch.ones_like(mean)
    if scale == "group":
        scale_P1 = std + eps
    elif scale == "power":
        scale_P1 = (std + eps) ** alpha
    elif scale == "others":  # r - mean of the others = (r - m) n / (n - 1)
        scale_P1 = torch.where(count > 1, (count - 1) / count.clamp(min=1), 1.0)
    elif scale == "mean":
        scale_P1 = mean + eps
    elif scale == "mean_abs":
        deviation = torch.where(scorable, (rewards_PG - mean).abs(), 0.0)
        scale_P1 = deviation.sum(1, keepdim=True) / count.clamp(min=1) + eps
    elif scale == "mad":
        spread = masked_quantile((rewards_PG - centre_P1).abs(), scorable, 0.5)
        scale_P1 = torch.where(spread > ROBUST_FLOOR * std, spread, std) + eps
    elif scale == "iqr":
        upper, lower = (masked_quantile(rewards_PG, scorable, q) for q in (0.75, 0.25))
        scale_P1 = torch.where(upper - lower > ROBUST_FLOOR * std, upper - lower, std) + eps
    return centre_P1, scale_P1
