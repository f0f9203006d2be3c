"""Rewards of several functions become one advantage per completion, and what is worth knowing about the groups.

Shapes: P prompts, G completions of one prompt, B = P*G sequences, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grpo_kernels import Normalized, normalize_with_statistics
from grpo_kernels.normalize.group_statistics import masked_statistics
from grpo_kernels.normalize.rewards import normalize_then_sum

from .normalization_state import NormalizationState


def weighted_rewards(rewards_BF: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """Weighted sum over reward functions, (B,). A missing (NaN) entry counts 0; NaN where every entry is missing."""
    total_B = (rewards_BF * weights_F).nansum(dim=1)
    return torch.where(rewards_BF.isnan().all(dim=1), torch.nan, total_B)


def compute_advantages(
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    method: str | Callable[..., torch.Tensor],
    options: Mapping[str, Any],
    aggregation: str,
    states: Sequence[NormalizationState] = (),
    **context: torch.Tensor,
) -> Normalized:
    """Advantages (P, G) of the gathered rewards (B, F), groups of ``num_generations`` following one another.

    ``sum_then_normalize``: the weighted sum is normalised by ``method``, whatever the method. ``normalize_then_sum``
    (GDPO, arXiv 2601.05242): each function's rewards are normalised by ``method`` (for ``beta``, ``max_rl`` and
    ``curvature`` each function's rewards must lie in [0, 1]), weighted and summed, and the sum is whitened over the
    batch, ``(x - mean) / (std + eps)``; with ``std`` that is TRL's. ``decoupled`` is that with ``std`` under either.

    ``states`` are those of a method that has one: one, or one a function (``number_of_states``). ``context`` is handed
    on, (P, G) ``lengths`` and (P,) ``prompt_keys``.
    """
    rewards_PGF = rewards_BF.view(-1, num_generations, rewards_BF.shape[1])
    context = {**context, "function_rewards": rewards_PGF, "function_weights": weights_F}
    eps = options.get("eps", 1e-4)

    def normalize(rewards_PG: torch.Tensor, f: int) -> Normalized:
        of_state = states[f].context(rewards_PG) if states else {}
        return normalize_with_statistics(rewards_PG, method, context={**context, **of_state}, **options)

    if aggregation == "sum_then_normalize" or method == "decoupled":
        return normalize(weighted_rewards(rewards_BF, weights_F).view(-1, num_generations), 0)
    return normalize_then_sum(rewards_PGF, weights_F, normalize, eps)


def number_of_states(n_functions: int, aggregation: str) -> int:
    """One for the sum, or one for each function that is normalised by itself."""
    return 1 if aggregation == "sum_then_normalize" else n_functions


def observe_rewards(
    states: Sequence[NormalizationState],
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    aggregation: str,
) -> None:
    """Shows each state the rewards it is the state of."""
    if aggregation == "sum_then_normalize":
        rewards_BF = weighted_rewards(rewards_BF, weights_F).unsqueeze(1)
    for state, column_B in zip(states, rewards_BF.unbind(1), strict=True):
        state.observe_rewards(column_B.view(-1, num_generations))


def live_groups(rewards_PG: torch.Tensor) -> torch.Tensor:
    """(P,) bool: at least two scorable rewards, and not all of them equal. The definition of a live group."""
    high_P = torch.where(rewards_PG.isnan(), -torch.inf, rewards_PG).amax(dim=1)
    low_P = torch.where(rewards_PG.isnan(), torch.inf, rewards_PG).amin(dim=1)
    return high_P > low_P


def zero_variance_groups(rewards_BF: torch.Tensor, weights_F: torch.Tensor, num_generations: int, aggregation: str):
    """Which of the P groups have nothing to tell apart: boolean (P,).

    True where all scorable rewards are equal or fewer than two are scorable. With ``normalize_then_sum`` that must
    hold of every reward function, since differences that cancel in the sum don't cancel there.
    """
    if aggregation == "sum_then_normalize":
        rewards_BF = weighted_rewards(rewards_BF, weights_F).unsqueeze(1)
    live_FP = torch.stack([live_groups(column_B.view(-1, num_generations)) for column_B in rewards_BF.unbind(1)])
    return ~live_FP.any(dim=0)


def _right_and_wrong(rewards_PG: torch.Tensor, dead_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """Shares of the groups whose answers are all right, and all wrong: of dead groups, by the batch's rewards."""
    scored = rewards_PG[~rewards_PG.isnan()]
    if len(scored) == 0:
        return {}
    low, high = scored.min(), scored.max()
    middle = torch.where(high > low, (low + high) / 2, torch.zeros_like(low))
    mean_P = rewards_PG.nanmean(dim=1)  # NaN, neither, where none is scorable
    return {
        "normalization/all_right_frac": (dead_P & (mean_P > middle)).float().mean(),
        "normalization/all_wrong_frac": (dead_P & (mean_P <= middle)).float().mean(),
    }


def normalization_metrics(
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    aggregation: str,
    normalized: Normalized,
) -> dict[str, float]:
    """What is logged of every batch.

    ``normalization/zero_variance_frac``: share of groups that give no advantage under a group baseline, counted per
    group for every method. (TRL's ``frac_reward_zero_std`` looks at whatever std it divides by, for ``batch`` the
    whole batch's.) Of these, ``all_right_frac`` and ``all_wrong_frac``: rewards above and up to the middle of the
    batch's range (of one reward alone: 0), of all groups. ``unscorable_frac``: share of completions that no reward
    function scored. ``scale_mean``, ``_min``, ``_max`` and ``centre_mean``, ``_max``: of the groups that have
    different rewards, in units of reward (where each reward function is normalised by itself, over all functions'
    groups); left out for methods that have none.
    ``advantage_mean``; ``advantage_abs_mean`` and ``advantage_max``, of absolute values.
    ``curvature/sigma_mean``: mean over the groups of the population std of their rewards, arXiv 2601.23135's sigma.
    """
    dead_P = zero_variance_groups(rewards_BF, weights_F, num_generations, aggregation)
    rewards_PG = weighted_rewards(rewards_BF, weights_F).view(-1, num_generations)
    count_P1, _, std_P1 = masked_statistics(rewards_PG, ~rewards_PG.isnan(), dim=(1,))
    sigma_P1 = std_P1 * ((count_P1 - 1).clamp(min=0) / count_P1.clamp(min=1)).sqrt()
    metrics = {
        "normalization/zero_variance_frac": dead_P.float().mean(),
        **_right_and_wrong(rewards_PG, dead_P),
        "normalization/unscorable_frac": rewards_BF.isnan().all(dim=1).float().mean(),
        "normalization/advantage_mean": normalized.advantages.mean(),
        "normalization/advantage_abs_mean": normalized.advantages.abs().mean(),
        "normalization/advantage_max": normalized.advantages.abs().max(),
        "curvature/sigma_mean": sigma_P1[count_P1 > 0].mean(),
    }
    live = ~dead_P
    if normalized.scale.ndim == 2:  # by function: a group may be live in one of them only
        live = torch.stack([live_groups(column_B.view(-1, num_generations)) for column_B in rewards_BF.unbind(1)], 1)
    scales, centres = normalized.scale[live], normalized.centre[live]
    if len(scales) and not scales.isnan().any():
        metrics |= {
            "normalization/scale_mean": scales.mean(),
            "normalization/scale_min": scales.min(),
            "normalization/scale_max": scales.max(),
            "normalization/centre_mean": centres.mean(),
            "normalization/centre_max": centres.max(),
        }
    numbers = torch.stack([value.double() for value in metrics.values()]).tolist()
    return {name: value for name, value in zip(metrics, numbers, strict=True) if value == value}
