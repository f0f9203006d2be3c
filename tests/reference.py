"""Reference implementations for the tests: obviously right and slow, without Triton and vectorisation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def normalize_rewards_reference(
    rewards: Sequence[Sequence[float]], method: str, *, eps: float = 1e-4, alpha: float = 1.0, **context: Any
) -> list[list[float]]:
    """``normalize_rewards`` in Python floats (float64), one group and one reward at a time."""
    if method == "decoupled":
        return _decoupled_reference(context["function_rewards"], context.get("function_weights"), eps)
    groups = [[reward for reward in group if not math.isnan(reward)] for group in rewards]
    everything = [reward for group in groups for reward in group]
    batch_mean = statistics.fmean(everything) if everything else 0.0
    batch_std = statistics.stdev(everything) if len(everything) > 1 else 0.0

    def advantage(p: int, reward: float) -> float:
        """Of a reward that isn't NaN."""
        group, others = groups[p], _without(groups[p], reward)
        if method == "none":
            return reward
        if method == "batch_mean":
            return reward - batch_mean
        if method == "global":
            return (reward - batch_mean) / (batch_std + eps) if batch_std + eps > 0 else 0.0
        if method == "shrinkage":
            return reward - _shrinkage_baseline(reward, others, groups[:p] + groups[p + 1 :])
        if len(group) < 2 or max(group) == min(group):
            return 0.0
        if method in ("median_mad", "iqr", "rank"):
            return _by_order(method, reward, group, eps)
        if method == "length_weighted":
            lengths = zip(context["lengths"][p], rewards[p], strict=True)
            weights = [length for length, other in lengths if not math.isnan(other)]
            return reward - statistics.fmean(group, weights if sum(weights) > 0 else None)
        if method == "loo":
            return reward - statistics.fmean(others)
        mean = statistics.fmean(group)
        if method == "beta":
            scale = _beta_density(mean, [statistics.fmean(other) for other in groups if other])
        else:
            scale = _scale(method, group, eps, alpha, {**context, "batch_std": batch_std}, p)
        return (reward - mean) / scale

    def row(p: int) -> list[float]:
        return [0.0 if math.isnan(reward) else advantage(p, reward) for reward in rewards[p]]

    return [row(p) for p in range(len(rewards))]


def _without(group: Sequence[float], reward: float) -> list[float]:
    """The group's other rewards."""
    others = list(group)
    others.remove(reward)
    return others


def _scale(method: str, group: Sequence[float], eps: float, alpha: float, context: Mapping[str, Any], p: int) -> float:
    """Of group p, for the methods that centre by the group's mean."""
    mean, std = statistics.fmean(group), statistics.stdev(group)
    if method == "mean":
        return 1.0
    if method == "power":
        return (std + eps) ** alpha
    spread = {
        "std": lambda: std,
        "batch_std": lambda: context["batch_std"],
        "mean_abs": lambda: statistics.fmean([abs(x - mean) for x in group]),
        "max_rl": lambda: mean,
        "running_std": lambda: math.sqrt(context["running_variance"]),
        "curvature": lambda: context["curvature_scale"][p],
    }[method]
    return spread() + eps


def _by_order(method: str, reward: float, scorable: Sequence[float], eps: float) -> float:
    """Methods of the sorted group: median with its absolute deviation, quartiles, mid-ranks."""
    if method == "rank":
        smaller, equal = sum(x < reward for x in scorable), sum(x == reward for x in scorable)
        mid_rank = smaller + (equal + 1) / 2
        return (mid_rank - (len(scorable) + 1) / 2) / ((len(scorable) - 1) / 2)
    std, middle = statistics.stdev(scorable), statistics.median(scorable)
    if method == "median_mad":
        spread = statistics.median([abs(other - middle) for other in scorable])
    else:
        lower, _, upper = statistics.quantiles(scorable, n=4, method="inclusive")
        spread = upper - lower
    return (reward - middle) / ((spread if spread > 0.01 * std else std) + eps)


def _shrinkage_baseline(reward: float, others: Sequence[float], other_groups: Sequence[Sequence[float]]) -> float:
    """JSPO's, of the other answers to this prompt and the groups of the other prompts; the reward itself if alone."""
    means = [statistics.fmean(group) for group in other_groups if group]
    if not means:
        return statistics.fmean(others) if others else reward
    if not others:
        return statistics.fmean(means)
    sampling = [statistics.variance(group) / len(group) for group in other_groups if len(group) > 1]
    v2 = statistics.fmean(sampling) if sampling else 0.0
    s2 = statistics.variance(means) if len(means) > 1 else 0.0
    lam = v2 / (v2 + s2 + 1e-6)
    return (1 - lam) * statistics.fmean(others) + lam * statistics.fmean(means)


def _beta_density(rate: float, rates: Sequence[float]) -> float:
    """BNPO's, at one pass rate, fitted to all of them by moments; 1 where they don't fit; at least 1e-6."""
    mu = statistics.fmean(rates)
    variance = statistics.variance(rates) if len(rates) > 1 else 0.0
    a = b = 0.0
    if 0 < variance < mu * (1 - mu):
        a = (mu * (1 - mu) / variance - 1) * mu
        b = (mu * (1 - mu) / variance - 1) * (1 - mu)
    alpha, beta = max(1.0, 1 + a / 3), max(1.0, 1 + b / 3)
    if (rate == 0 and alpha > 1) or (rate == 1 and beta > 1):
        return 1e-6
    log_density = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)  # of nearly equal rates it is huge
    log_density += (alpha - 1) * math.log(rate) if alpha > 1 else 0.0
    log_density += (beta - 1) * math.log1p(-rate) if beta > 1 else 0.0
    return math.exp(max(log_density, math.log(1e-6)))


def _decoupled_reference(function_rewards, function_weights, eps: float) -> list[list[float]]:
    n_functions = len(function_rewards[0][0])
    weights = function_weights or [1.0] * n_functions
    each = [
        normalize_rewards_reference([[answer[f] for answer in group] for group in function_rewards], "std", eps=eps)
        for f in range(n_functions)
    ]
    total = [
        [
            math.nan if all(map(math.isnan, answer)) else sum(weights[f] * each[f][p][i] for f in range(n_functions))
            for i, answer in enumerate(group)
        ]
        for p, group in enumerate(function_rewards)
    ]
    return normalize_rewards_reference(total, "global", eps=eps)


def head_logprobs(hidden, weight, targets, *, bias=None, low_rank=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """(log-probs of the targets, entropies), (N,): the head in plain torch, with all logits, in the inputs' dtype."""
    y = hidden @ weight.T
    if low_rank is not None:
        y = y + low_rank[0] @ low_rank[1].T
    if bias is not None:
        y = y + bias
    z = logit_scale * y if softcap is None else softcap * torch.tanh(logit_scale * y / softcap)
    logp = (z / temperature).log_softmax(-1)
    finite = torch.where(logp.isinf(), 0.0, logp)  # p log p is 0 where p is
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * finite).sum(-1)


def grpo_loss(
    logprobs,
    entropies,
    sequence,
    advantages,
    weights,
    *,
    old_logprobs=None,
    ref_logprobs=None,
    policy_scale=None,
    loss_type="grpo",
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    sapo_temperatures=(1.0, 1.05),
    beta=0.0,
    kl_times_ratio=True,
    entropy_coef=0.0,
):
    """The loss of ``linear_grpo_loss`` from log-probs, written as the papers write it; autograd does the rest."""
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    advantage = advantages[sequence]
    ratio = torch.exp(logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs))
    if loss_type == "cispo":
        policy = -ratio.clamp(max=epsilon_high).detach() * advantage * logprobs
    elif loss_type == "sapo":
        steepness = torch.where(advantage > 0, sapo_temperatures[0], sapo_temperatures[1])
        policy = -torch.sigmoid(steepness * (ratio - 1)) * 4 / steepness * advantage
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        capped = ratio if delta is None else ratio.clamp(max=delta)
        policy = -torch.min(capped * advantage, clipped * advantage)
    if policy_scale is not None:
        policy = policy * policy_scale
    loss = policy
    if beta:
        kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
        loss = loss + beta * (kl * ratio if kl_times_ratio else kl)
    return (weights[sequence] * loss).sum() - entropy_coef * entropies.mean()
