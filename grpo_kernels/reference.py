"""The obviously right versions: slow, a few lines each, no Triton, no vectorisation. Oracles for the tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def normalize_rewards_reference(
    rewards: Sequence[Sequence[float]], method: str, *, eps: float = 1e-4, alpha: float = 1.0
) -> list[list[float]]:
    """``normalize_rewards`` in Python floats (float64), one group and one reward at a time."""
    everything = [reward for group in rewards for reward in group if not math.isnan(reward)]
    batch_mean = statistics.fmean(everything) if everything else 0.0
    batch_std = statistics.stdev(everything) if len(everything) > 1 else 0.0

    def advantage(group: Sequence[float], index: int) -> float:
        reward = group[index]
        if math.isnan(reward):
            return 0.0
        scorable = [other for other in group if not math.isnan(other)]
        others = [group[j] for j in range(len(group)) if j != index and not math.isnan(group[j])]
        if method == "none":
            return reward
        if method == "batch_mean":
            return reward - batch_mean
        if method == "global":
            return (reward - batch_mean) / (batch_std + eps) if batch_std + eps > 0 else 0.0
        if len(scorable) < 2 or max(scorable) == min(scorable):
            return 0.0
        mean, std = statistics.fmean(scorable), statistics.stdev(scorable)
        return {
            "mean": lambda: reward - mean,
            "loo": lambda: reward - statistics.fmean(others),
            "std": lambda: (reward - mean) / (std + eps),
            "batch_std": lambda: (reward - mean) / (batch_std + eps),
            "power": lambda: (reward - mean) / (std + eps) ** alpha,
        }[method]()

    return [[advantage(group, index) for index in range(len(group))] for group in rewards]
