"""The centre and the scale of each group in plain torch, of its scorable (not NaN) rewards alone.

Shapes: P prompts, G completions of one prompt.
"""

from __future__ import annotations

import torch

# MAD and IQR below this share of the std, 0 above all, say nothing of the spread: the std takes their place there
ROBUST_FLOOR = 0.01


def masked_statistics(
    values: torch.Tensor, mask: torch.Tensor, dim: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and sample standard deviation (ddof=1) of the masked values over ``dim``, which is kept.

    Equal values give exactly themselves and exactly 0: the mean of eight times 0.1 isn't 0.1 in float32, and that
    residue over a tiny std would become a large advantage. Deviations are taken relative to the range, so that
    neither huge nor tiny values overflow or vanish when squared. An empty mask gives 0, 0, 0.
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
    """The smallest masked value, and the largest less the smallest; 0, 0 where there is none."""
    some = mask.any(dim=dim, keepdim=True) if len(dim) == 1 else mask.any()
    high = torch.where(mask, values, -torch.inf).amax(dim=dim, keepdim=True)
    low = torch.where(mask, values, torch.inf).amin(dim=dim, keepdim=True)
    return torch.where(some, low, 0.0), torch.where(some, high - low, 0.0)


def weighted_mean(values_PG: torch.Tensor, mask_PG: torch.Tensor, weights_PG: torch.Tensor) -> torch.Tensor:
    """(P, 1) mean of the masked values with these weights; exactly the value where all are equal."""
    offset, width = _offset_and_width(values_PG, mask_PG, (1,))
    weights_PG = torch.where(mask_PG, weights_PG, 0.0)
    deviation = torch.where(mask_PG, values_PG - offset, 0.0)
    total = weights_PG.sum(1, keepdim=True)
    return torch.where(width > 0, offset + (weights_PG * deviation).sum(1, keepdim=True) / total, offset)


def masked_quantile(values_PG: torch.Tensor, mask_PG: torch.Tensor, q: float) -> torch.Tensor:
    """(P, 1) quantile of the masked values, linear between neighbours as in ``numpy.quantile``; 0 of none."""
    ordered = torch.where(mask_PG, values_PG, torch.inf).sort(dim=1).values
    last = (mask_PG.sum(1, keepdim=True) - 1).clamp(min=0)
    place = q * last.to(values_PG.dtype)
    below = place.floor().long()
    low = ordered.gather(1, below)
    high = ordered.gather(1, torch.minimum(below + 1, last))
    value = torch.where(high > low, low + (place - below) * (high - low), low)
    return torch.where(mask_PG.any(1, keepdim=True), value, 0.0)


def mid_ranks(values_PG: torch.Tensor, mask_PG: torch.Tensor) -> torch.Tensor:
    """Ranks 1 to n within each group, equal values sharing the mean of theirs (double argsort would part them)."""
    ordered = torch.where(mask_PG, values_PG, torch.inf).sort(dim=1).values
    wanted = torch.where(mask_PG, values_PG, 0.0)
    below = torch.searchsorted(ordered, wanted, side="left")
    up_to = torch.searchsorted(ordered, wanted, side="right")
    return (below + up_to + 1).to(values_PG.dtype) / 2


def group_centre_and_scale(
    rewards_PG: torch.Tensor, centre: str, scale: str, eps: float, alpha: float, lengths_PG: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, 1) and (P, 1), by the names of ``Method.centre`` and ``Method.scale``; zeros and ones for ``given``."""
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
