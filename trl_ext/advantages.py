"""Rewards of several functions become one advantage per completion, and what is worth knowing about the groups.

Shapes: P prompts, G completions of one prompt, B = P*G sequences, F reward functions.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels import normalize_rewards


def weighted_rewards(rewards_BF: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """Weighted sum over reward functions, (B,). A missing (NaN) entry counts 0; NaN where every entry is missing."""
    total_B = (rewards_BF * weights_F).nansum(dim=1)
    return torch.where(rewards_BF.isnan().all(dim=1), torch.nan, total_B)


def compute_advantages(
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    method: str,
    options: dict[str, Any],
    aggregation: str,
) -> torch.Tensor:
    """Advantages (B,) of the gathered rewards (B, F), groups of ``num_generations`` following one another.

    ``sum_then_normalize``: the weighted sum is normalised by ``method``. ``normalize_then_sum`` (GDPO, arXiv
    2601.05242): each function's rewards are normalised by ``method``, weighted and summed, and the sum is whitened
    over the batch, ``(x - mean) / (std + 1e-4)``; with ``std`` that is TRL's.
    """
    if aggregation == "sum_then_normalize":
        rewards_PG = weighted_rewards(rewards_BF, weights_F).view(-1, num_generations)
        return normalize_rewards(rewards_PG, method, **options).flatten()
    normalized_BF = torch.stack(
        [
            normalize_rewards(column_B.view(-1, num_generations), method, **options).flatten()
            for column_B in rewards_BF.T
        ],
        dim=1,
    )
    # a function's missing entries are 0 by now; a completion nobody scored is missing again
    sum_B = (normalized_BF * weights_F).sum(dim=1)
    sum_B = torch.where(rewards_BF.isnan().all(dim=1), torch.nan, sum_B)
    return normalize_rewards(sum_B.view(-1, num_generations), "global").flatten()


def zero_variance_groups(rewards_BF: torch.Tensor, weights_F: torch.Tensor, num_generations: int, aggregation: str):
    """Which of the P groups have nothing to tell apart: boolean (P,).

    True where all scorable rewards are equal or fewer than two are scorable. With ``normalize_then_sum`` that must
    hold of every reward function, since differences that cancel in the sum don't cancel there.
    """
    if aggregation == "sum_then_normalize":
        rewards_BF = weighted_rewards(rewards_BF, weights_F).unsqueeze(1)
    grouped_PGF = rewards_BF.view(-1, num_generations, rewards_BF.shape[1])
    high_PF = torch.where(grouped_PGF.isnan(), -torch.inf, grouped_PGF).amax(dim=1)
    low_PF = torch.where(grouped_PGF.isnan(), torch.inf, grouped_PGF).amin(dim=1)
    return (high_PF <= low_PF).all(dim=1)


def normalization_metrics(
    rewards_BF: torch.Tensor, weights_F: torch.Tensor, num_generations: int, aggregation: str
) -> dict[str, float]:
    """What is logged of every batch under ``normalization/``.

    ``zero_variance_frac``: share of groups that give no advantage under a group baseline, counted per group for every
    method. (TRL's ``frac_reward_zero_std`` looks at whatever std it divides by, for ``batch`` the whole batch's.)
    ``unscorable_frac``: share of completions that no reward function scored.
    """
    dead_P = zero_variance_groups(rewards_BF, weights_F, num_generations, aggregation)
    return {
        "normalization/zero_variance_frac": dead_P.float().mean().item(),
        "normalization/unscorable_frac": rewards_BF.isnan().all(dim=1).float().mean().item(),
    }
