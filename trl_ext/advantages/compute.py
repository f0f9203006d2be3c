"""Computes one advantage per completion from the rewards of several functions, and metrics of the groups.

Shapes: P prompts, G completions of one prompt, B = P*G sequences, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from grpo_kernels import Normalized, normalize_with_statistics
from grpo_kernels.normalize.group_statistics import masked_statistics
from grpo_kernels.normalize.rewards import normalize_then_sum
from grpo_kernels.normalize.shared_options import limit_advantages, most_varied_groups, reward_spread

from .normalization_state import NormalizationState

LIMITS = ("clip", "keep_variance")  # options of any named method that apply to the final advantages


def weighted_rewards(rewards_BF: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """Returns the weighted sum over reward functions, (B,). A NaN entry counts as 0; if all are NaN, the sum is NaN."""
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
    task_P: torch.Tensor | None = None,
    **context: torch.Tensor,
) -> Normalized:
    """Computes the advantages (P, G) of gathered rewards.

    Args:
        rewards_BF: (B, F), NaN where unscorable; the completions of a prompt are consecutive.
        weights_F: (F,), the weights of the reward functions.
        num_generations: G.
        method: a name in ``METHODS``, or a function.
        options: the method's options.
        aggregation: "sum_then_normalize" normalises the weighted sum by ``method``. "normalize_then_sum" (GDPO, arXiv
            2601.05242) normalises each function's rewards by ``method``, sums them with the weights, and whitens the
            sum over the batch, ``(x - mean) / (std + eps)``; with ``std`` that is TRL's. There, ``beta``, ``max_rl``
            and ``curvature`` need every function's rewards in [0, 1]. The method ``decoupled`` means
            "normalize_then_sum" with ``std``, whatever the aggregation. ``clip`` and ``keep_variance`` apply to the
            sum; the latter compares the variances of the weighted rewards.
        states: the states of a method that has one, see ``number_of_states``.
        task_P: (P,) the prompts' task keys, for the states.
        context: passed on to the method: (P, G) ``lengths`` and (P,) ``prompt_keys``.
    """
    rewards_PGF = rewards_BF.view(-1, num_generations, rewards_BF.shape[1])
    context = {**context, "function_rewards": rewards_PGF, "function_weights": weights_F}
    eps = options.get("eps", 1e-4)

    def normalize(rewards_PG: torch.Tensor, f: int) -> Normalized:
        state_context = states[f].context(rewards_PG, task_P) if states else {}
        return normalize_with_statistics(rewards_PG, method, context={**context, **state_context}, **own)

    summed_PG = weighted_rewards(rewards_BF, weights_F).view(-1, num_generations)
    limits = {} if callable(method) else {name: options[name] for name in LIMITS if name in options}
    own = {name: value for name, value in options.items() if name not in limits}
    if aggregation == "sum_then_normalize" or method == "decoupled":
        normalized = normalize(summed_PG, 0)
    else:
        normalized = normalize_then_sum(rewards_PGF, weights_F, normalize, eps)
    return limit_advantages(normalized, summed_PG, **limits)


def number_of_states(n_functions: int, aggregation: str) -> int:
    """Returns how many states a method needs: one for the sum, or one per function normalised by itself."""
    return 1 if aggregation == "sum_then_normalize" else n_functions


def observe_rewards(
    states: Sequence[NormalizationState],
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    num_generations: int,
    aggregation: str,
    task_P: torch.Tensor | None = None,
) -> None:
    """Updates each state with its rewards: the weighted sum, or those of its reward function."""
    if aggregation == "sum_then_normalize":
        rewards_BF = weighted_rewards(rewards_BF, weights_F).unsqueeze(1)
    for state, column_B in zip(states, rewards_BF.unbind(1), strict=True):
        state.observe_rewards(column_B.view(-1, num_generations), task_P)


def live_groups(rewards_PG: torch.Tensor, tolerance: float = 0.0) -> torch.Tensor:
    """Returns (P,) bool: whether a group is live: it has scorable rewards that differ by more than ``tolerance``."""
    return reward_spread(rewards_PG) > tolerance


def zero_variance_groups(
    rewards_BF: torch.Tensor, weights_F: torch.Tensor, num_generations: int, aggregation: str, tolerance: float = 0.0
) -> torch.Tensor:
    """Returns (P,) bool: whether a group is dead, that is, not live.

    With ``normalize_then_sum`` a group is dead only if it is dead for every reward function: differences may cancel in
    the weighted sum, but not if each function is normalised by itself.
    """
    if aggregation == "sum_then_normalize":
        rewards_BF = weighted_rewards(rewards_BF, weights_F).unsqueeze(1)
    return ~_live_by_function(rewards_BF, num_generations, tolerance).any(dim=1)


def _live_by_function(rewards_BF: torch.Tensor, num_generations: int, tolerance: float) -> torch.Tensor:
    """Returns (P, F) bool: whether a group is live for each reward function."""
    columns = (column_B.view(-1, num_generations) for column_B in rewards_BF.unbind(1))
    return torch.stack([live_groups(column_PG, tolerance) for column_PG in columns], dim=1)


def _right_and_wrong(rewards_PG: torch.Tensor, dead_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the shares of groups that are dead and all right, or dead and all wrong.

    A dead group is all right if its mean is above the middle of the batch's range of rewards.
    """
    scored = rewards_PG[~rewards_PG.isnan()]
    if len(scored) == 0:
        return {}
    low, high = scored.min(), scored.max()
    middle = torch.where(high > low, (low + high) / 2, torch.zeros_like(low))
    mean_P = rewards_PG.nanmean(dim=1)  # NaN (neither right nor wrong) if no reward is scorable
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
    tolerance: float = 0.0,
    keep_variance: float | None = None,
) -> dict[str, float]:
    """Returns the metrics of a batch's normalisation.

    Under ``normalization/``:

    * ``zero_variance_frac``: share of dead groups, the same definition for every method. (TRL's
      ``frac_reward_zero_std`` uses the std that it divides by; for "batch" that is the batch's.)
    * ``all_right_frac``, ``all_wrong_frac``: shares of groups that are dead and whose rewards are above, or not above,
      the middle of the batch's range. If the batch has only one reward, the middle is 0.
    * ``unscorable_frac``: share of completions that no reward function scored.
    * ``left_out_frac``: with ``keep_variance``, share of groups that are live and left out.
    * ``scale_mean``, ``scale_min``, ``scale_max``, ``centre_mean``, ``centre_max``: of live groups, in units of reward;
      over the groups of all functions if each is normalised by itself. Missing for methods without a scale.
    * ``advantage_mean``, and ``advantage_abs_mean`` and ``advantage_max`` of absolute values.

    ``curvature/sigma_mean``: the mean population std of a group's rewards, sigma in arXiv 2601.23135.
    """
    dead_P = zero_variance_groups(rewards_BF, weights_F, num_generations, aggregation, tolerance)
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
    if keep_variance is not None:
        left_out_P = ~dead_P & ~most_varied_groups(rewards_PG, keep_variance)
        metrics["normalization/left_out_frac"] = left_out_P.float().mean()
    live = ~dead_P
    if normalized.scale.ndim == 2:  # (P, F): a group may be live for one function only
        live = _live_by_function(rewards_BF, num_generations, tolerance)
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
