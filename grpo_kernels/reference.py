"""The obviously right versions: slow, a few lines each, no Triton, no vectorisation. Oracles for the tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch


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
