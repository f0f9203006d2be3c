"""Computes each token's term of the loss, and its derivative with respect to the token's log-prob.

Shapes: N live tokens. The semantics are TRL 1.16's, with ratios of single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grpo_kernels.normalize.methods import METHODS
from grpo_kernels.normalize.rewards import normalize_rewards

# Loss types differ in the weight of a token (weights_B of linear_grpo_loss); there are three surrogates.
SURROGATES = {
    "grpo": "clip",
    "bnpo": "clip",
    "dr_grpo": "clip",
    "dapo": "clip",
    "luspo": "clip",
    "cispo": "cispo",
    "sapo": "sapo",
}


@dataclass(frozen=True)
class TokenLoss:
    """The options of a token's loss, which ``linear_grpo_loss`` documents and checks."""

    surrogate: str = "clip"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo_positive: float = 1.0
    sapo_negative: float = 1.05
    beta: float = 0.0
    kl_times_ratio: bool = True


@dataclass
class GroupRewards:
    """Rewards of each sequence's group, given instead of advantages. The Triton kernel normalises them."""

    rewards: torch.Tensor  # (B, G)
    position: torch.Tensor  # (B,), of the sequence in its group
    method: str
    eps: float
    alpha: float

    def advantages(self) -> torch.Tensor:
        """Computes the advantages (B,) by ``normalize_rewards``."""
        options: Mapping[str, Any] = {"alpha": self.alpha} if METHODS[self.method].options else {}
        advantages_BG = normalize_rewards(self.rewards, self.method, eps=self.eps, **options)
        return advantages_BG.gather(1, self.position[:, None]).squeeze(1)

    def has_advantage(self) -> torch.Tensor:
        """Returns (B,) bool: False where the advantage is certainly 0, judged by the rewards alone."""
        own_B = self.rewards.gather(1, self.position[:, None]).squeeze(1)
        if METHODS[self.method].centre == "zero":
            return ~own_B.isnan() & (own_B != 0)
        scorable = ~self.rewards.isnan()
        high_B = torch.where(scorable, self.rewards, -torch.inf).amax(1)
        low_B = torch.where(scorable, self.rewards, torch.inf).amin(1)
        return ~own_B.isnan() & (high_B > low_B)


@dataclass
class TokenInputs:
    """The inputs of the row arithmetic in addition to logits: (N,) each, or None."""

    targets: torch.Tensor
    sequence: torch.Tensor
    weights: torch.Tensor  # weights_B of the token's sequence
    advantages: torch.Tensor | None  # None: computed from group_rewards
    group_rewards: GroupRewards | None
    old: torch.Tensor | None
    ref: torch.Tensor | None
    policy_scale: torch.Tensor | None

    def token_advantages(self) -> torch.Tensor:
        """Returns the advantages (N,), computed from the rewards if none are given."""
        if self.advantages is None:
            assert self.group_rewards is not None
            return self.group_rewards.advantages()[self.sequence]
        return self.advantages

    def may_be_live(self, options: TokenLoss, entropy_grad: float) -> torch.Tensor:
        """Returns (N,) bool: False for a token whose d loss / d logprob is 0 for every value of its log-prob."""
        if entropy_grad:
            return torch.ones_like(self.targets, dtype=torch.bool)
        weighted = self.weights != 0
        if options.beta:
            return weighted
        if self.advantages is None:
            assert self.group_rewards is not None
            live = weighted & self.group_rewards.has_advantage()[self.sequence]
        else:
            live = weighted & (self.advantages != 0)
        return live if self.policy_scale is None else live & (self.policy_scale != 0)


class TokenLosses(NamedTuple):
    """Values of each token, (N,)."""

    loss: torch.Tensor  # policy term + beta KL
    coefficient: torch.Tensor  # d loss / d logprob
    ratio: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor | None


def token_losses(
    logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    old_logprobs_N: torch.Tensor | None,
    ref_logprobs_N: torch.Tensor | None,
    policy_scale_N: torch.Tensor | None,
    options: TokenLoss,
) -> TokenLosses:
    """Computes the loss of each token (not weighted), and its derivative by the log-prob.

    With r = exp(logprob - old) (1 on policy, where old is None), A the advantage and l = logprob::

        clip   -min(min(r, delta) A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)   PPO, dual clip for delta
        cispo  -min(r, epsilon_high) A l, the ratio without gradient                  arXiv 2506.13585
        sapo   -4/t sigmoid(t (r - 1)) A, t by the sign of A                          arXiv 2511.20347
        KL     exp(ref - l) - (ref - l) - 1, times r with kl_times_ratio              k3, DeepSeek-V3.2

    The policy term of a token with advantage 0, and its derivative, are exactly 0, however large its ratio.
    """
    ratio = torch.ones_like(logprobs_N) if old_logprobs_N is None else torch.exp(logprobs_N - old_logprobs_N)
    if options.surrogate == "clip":
        policy, coefficient, clipped = _clipped_surrogate(ratio, advantages_N, options)
    elif options.surrogate == "cispo":
        capped = ratio.clamp(max=options.epsilon_high)
        policy = -capped * advantages_N * logprobs_N
        coefficient = -capped * advantages_N
        clipped = (ratio > options.epsilon_high) & (advantages_N > 0)
    else:
        steepness = torch.where(advantages_N > 0, options.sapo_positive, options.sapo_negative)
        gate = torch.sigmoid(steepness * (ratio - 1))
        policy = -gate * 4 / steepness * advantages_N
        # where gate is 1, its slope is 0 but the ratio may be inf
        coefficient = torch.where(gate < 1, -4 * gate * (1 - gate) * ratio * advantages_N, 0.0)
        clipped = torch.zeros_like(advantages_N, dtype=torch.bool)
    live = advantages_N != 0
    policy, coefficient = torch.where(live, policy, 0.0), torch.where(live, coefficient, 0.0)
    if policy_scale_N is not None:
        scaled = policy_scale_N != 0
        policy = torch.where(scaled, policy * policy_scale_N, 0.0)
        coefficient = torch.where(scaled, coefficient * policy_scale_N, 0.0)
    if ref_logprobs_N is None:
        return TokenLosses(policy, coefficient, ratio, clipped, None)
    kl, slope = _kl(logprobs_N, ref_logprobs_N, ratio if options.kl_times_ratio else None)
    if options.beta == 0:
        return TokenLosses(policy, coefficient, ratio, clipped, kl)
    return TokenLosses(policy + options.beta * kl, coefficient + options.beta * slope, ratio, clipped, kl)


def _clipped_surrogate(
    ratio: torch.Tensor, advantage: torch.Tensor, options: TokenLoss
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns PPO's policy term, its derivative by the log-prob, and whether clipping removes that."""
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
    first, second = capped * advantage, ratio.clamp(low, high) * advantage
    # at a tie of min each side gets half of the gradient, as in torch
    share = (first < second).to(ratio.dtype) + 0.5 * (first == second).to(ratio.dtype)
    first_slope = torch.ones_like(ratio) if options.delta is None else (ratio <= options.delta).to(ratio.dtype)
    second_slope = ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
    slope = share * first_slope + (1 - share) * second_slope
    coefficient = torch.where(slope > 0, -slope * ratio * advantage, 0.0)  # 0, not inf * 0 = NaN
    clipped = ((capped < low) & (advantage < 0)) | ((capped > high) & (advantage > 0))
    return -torch.minimum(first, second), coefficient, clipped


def _kl(
    logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor, ratio: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns k3, times the ratio if one is given, and its derivative by the log-prob."""
    log_ratio = ref_logprobs_N - logprobs_N
    kl = torch.expm1(log_ratio) - log_ratio
    if ratio is None:
        return kl, -torch.expm1(log_ratio)
    # d (r kl) / d logprob = r (kl + d kl / d logprob) = -r log_ratio; this form has no cancellation
    return kl * ratio, -ratio * log_ratio
