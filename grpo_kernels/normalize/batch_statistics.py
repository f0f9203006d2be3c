"""Computes each group's centre and scale from statistics of the batch, before the pass over the groups.

Shapes: P prompts, G completions of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .group_statistics import masked_statistics

LARGEST_INVERSE_PDF = 1e6


def batch_mean_and_std(rewards_PG: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and sample std (0-d) of all scorable rewards; ``context`` may override them."""
    _, mean, std = masked_statistics(rewards_PG, ~rewards_PG.isnan(), dim=(0, 1))
    given = [
        rewards_PG.new_tensor(float(context[name])) if name in context else own.reshape(())
        for name, own in (("batch_mean", mean), ("batch_std", std))
    ]
    return given[0], given[1]


def shrinkage(rewards_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns centre and scale (P, 1) of JSPO's baseline, arXiv 2511.03710::

        A = r - [(1 - lam) loo + lam mu],  lam = v2 / (v2 + s2 + 1e-6)

    Over the other prompts, mu is the mean of their means, s2 the sample variance of their means, and v2 the mean of
    their (sample variance / n). loo = (n m - r) / (n - 1) is the mean of the group's other rewards. So A is
    (1 + (1 - lam) / (n - 1)) r minus a constant of the group. lam is 0 without another prompt, and 1 in a group of one.
    """
    scorable = ~rewards_PG.isnan()
    count, mean, std = (x.double() for x in masked_statistics(rewards_PG, scorable, dim=(1,)))
    some, several = (count > 0).double(), (count > 1).double()

    # sums over the other prompts = sums over all - own; around the common mean, to avoid cancellation
    others = some.sum() - some
    middle = (mean * some).sum() / some.sum().clamp(min=1)
    deviation = (mean - middle) * some
    other_deviation = (deviation.sum() - deviation) / others.clamp(min=1)
    other_mean = middle + other_deviation
    squares = deviation.square().sum() - deviation.square()
    s2 = ((squares - others * other_deviation.square()) / (others - 1).clamp(min=1)).clamp(min=0) * (others > 1)
    sampling = std.square() / count.clamp(min=1) * several
    v2 = (sampling.sum() - sampling) / (several.sum() - several).clamp(min=1)

    lam = torch.where(others > 0, v2 / (v2 + s2 + 1e-6), 0.0)
    lam = torch.where((count == 1) & (others > 0), 1.0, lam)
    weight = torch.where(count > 1, (1 - lam) / (count - 1).clamp(min=1), 0.0)  # coefficient of r in the baseline
    own = torch.where(count > 1, weight * count * mean, (1 - lam) * mean)
    centre = (own + lam * other_mean) / (1 + weight)
    return centre.to(rewards_PG.dtype), (1 / (1 + weight)).to(rewards_PG.dtype)


def beta_density(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Returns the scale (P, 1) of BNPO, arXiv 2506.02864: the density of Beta(max(1, 1 + a/3), max(1, 1 + b/3)) at m.

    a and b are fitted by moments to the batch's pass rates m, with mean mu and sample variance v::

        a = (mu (1 - mu) / v - 1) mu,  b = (mu (1 - mu) / v - 1) (1 - mu)

    If the moments fit no Beta distribution (v = 0, or v >= mu (1 - mu)), a = b = 0: the density is 1, and the method
    equals ``mean``. The scale is at least 1e-6, so that an advantage is at most a million.
    """
    scorable = ~rewards_PG.isnan()
    count, mean_P1, _ = masked_statistics(rewards_PG, scorable, dim=(1,))
    rate = mean_P1.double()
    _, mu, std = masked_statistics(rate, count > 0, dim=(0, 1))
    variance, room = std.square(), mu * (1 - mu)
    feasible = (variance > 0) & (variance < room)
    concentration = torch.where(feasible, room / torch.where(feasible, variance, 1.0) - 1, 0.0)
    alpha = (1 + concentration * mu / 3).clamp(min=1)
    beta = (1 + concentration * (1 - mu) / 3).clamp(min=1)
    normaliser = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    # xlogy defines 0 log 0 = 0, for alpha or beta = 1 and m = 0 or 1
    density = torch.exp(torch.xlogy(alpha - 1, rate) + torch.xlogy(beta - 1, 1 - rate) - normaliser)
    return density.clamp(min=1 / LARGEST_INVERSE_PDF).to(rewards_PG.dtype)
