"""Applies the options that every named normalisation takes: tolerance before it, clip and keep_variance after it.

Shapes: P prompts, G completions of one prompt.
"""

from __future__ import annotations

import torch

from .group_statistics import masked_statistics
from .normalized import Normalized

ROUNDING = 1e-9  # share of the summed variance that a sum in another order may miss


def reward_spread(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Returns (P,) float64, the largest minus the smallest scorable reward of each group; -inf without any."""
    high_P = torch.where(rewards_PG.isnan(), -torch.inf, rewards_PG).double().amax(dim=1)
    low_P = torch.where(rewards_PG.isnan(), torch.inf, rewards_PG).double().amin(dim=1)
    return torch.where(high_P >= low_P, high_P - low_P, -torch.inf)


def merge_equal(rewards_PG: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Returns the rewards with those of a group that differ by at most ``tolerance`` replaced by their mean.

    So they are a group of equal rewards for every method. The rule is SkyRL's ``zero_variance_filter_tol``.
    """
    if tolerance == 0:
        return rewards_PG
    scorable = ~rewards_PG.isnan()
    _, mean_P1, _ = masked_statistics(rewards_PG, scorable, dim=(1,))
    merged = (reward_spread(rewards_PG) <= tolerance)[:, None] & scorable
    return torch.where(merged, mean_P1, rewards_PG)


def most_varied_groups(rewards_PG: torch.Tensor, share: float) -> torch.Tensor:
    """Returns (P,) bool: the fewest groups whose reward variances sum to ``share`` of all groups' sum.

    This is RAGEN-2's filter (top-p by reward variance, arXiv 2604.06268, TRL pull request 7242), without the factor by
    which RAGEN scales the loss. Groups of equal rewards are never kept. Of equal variances the first are kept.
    """
    _, _, std_P1 = masked_statistics(rewards_PG.double(), ~rewards_PG.isnan(), dim=(1,))
    variance_P = std_P1[:, 0].square()
    descending_P, order_P = variance_P.sort(descending=True, stable=True)
    before_P = descending_P.cumsum(0) - descending_P
    wanted = (share - ROUNDING) * variance_P.sum()
    kept_P = torch.zeros_like(variance_P, dtype=torch.bool)
    kept_P[order_P] = (before_P < wanted) & (descending_P > 0)
    return kept_P


def limit_advantages(
    normalized: Normalized, rewards_PG: torch.Tensor, clip: float | None = None, keep_variance: float | None = None
) -> Normalized:
    """Returns the advantages, clipped to [-clip, clip], and 0 in the groups that ``most_varied_groups`` leaves out."""
    advantages_PG = normalized.advantages
    if clip is not None:
        advantages_PG = advantages_PG.clamp(-clip, clip)
    if keep_variance is not None and len(rewards_PG):
        kept_P = most_varied_groups(rewards_PG, keep_variance)
        advantages_PG = torch.where(kept_P[:, None], advantages_PG, 0.0)
    return normalized._replace(advantages=advantages_PG)
