"""Computes the loss of one token, and its derivative by the log-prob, in Triton; see ``token_losses.py``.

If a field of an argument is None, code that would read it isn't compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tokens(NamedTuple):
    """The tokens of a tile's rows, and the inputs of every token's loss: (N,) each, or None."""

    rows: Any  # (C,), the token of each row
    targets: Any
    sequence: Any
    position: Any  # (B,), of a sequence in its group; None if advantages are given
    weights: Any
    advantages: Any  # None: computed from the group's rewards
    old: Any
    ref: Any
    policy_scale: Any


class LossNumbers(NamedTuple):
    """The numbers of ``TokenLoss``, and dL/dentropy of every token."""

    low: Any  # lower bound of the ratio
    high: Any  # upper bound of the ratio
    delta: Any  # second upper bound of the ratio, or None
    sapo_positive: Any
    sapo_negative: Any
    beta: Any
    entropy_grad: Any  # None stands for 0


@triton.jit
def token_loss(tokens, i_token, logprob, advantage, numbers, SURROGATE: tl.constexpr, KL_TIMES_RATIO: tl.constexpr):
    """Returns (loss, d loss / d logprob, ratio, clipped, kl) of one token, by the equations of token_losses.py."""
    ratio = 1.0
    if tokens.old is not None:
        ratio = tl.exp(logprob - tl.load(tokens.old + i_token))
    if SURROGATE == "clip":
        capped = ratio
        first_slope = 1.0
        if numbers.delta is not None:
            capped = tl.minimum(ratio, numbers.delta)
            first_slope = tl.where(ratio <= numbers.delta, 1.0, 0.0)
        first = capped * advantage
        second = tl.minimum(tl.maximum(ratio, numbers.low), numbers.high) * advantage
        loss = -tl.minimum(first, second)
        share = tl.where(first < second, 1.0, tl.where(first == second, 0.5, 0.0))
        second_slope = tl.where((ratio >= numbers.low) & (ratio <= numbers.high), 1.0, 0.0)
        slope = share * first_slope + (1.0 - share) * second_slope
        coefficient = tl.where(slope > 0, -slope * ratio * advantage, 0.0)
        clipped = ((capped < numbers.low) & (advantage < 0)) | ((capped > numbers.high) & (advantage > 0))
    elif SURROGATE == "cispo":
        capped = tl.minimum(ratio, numbers.high)
        loss = -capped * advantage * logprob
        coefficient = -capped * advantage
        clipped = (ratio > numbers.high) & (advantage > 0)
    else:
        steepness = tl.where(advantage > 0, numbers.sapo_positive, numbers.sapo_negative)
        gate = tl.sigmoid(steepness * (ratio - 1.0))
        loss = -gate * 4.0 / steepness * advantage
        coefficient = tl.where(gate < 1.0, -4.0 * gate * (1.0 - gate) * ratio * advantage, 0.0)
        clipped = ratio < 0
    loss = tl.where(advantage != 0, loss, 0.0)
    coefficient = tl.where(advantage != 0, coefficient, 0.0)
    if tokens.policy_scale is not None:
        policy_scale = tl.load(tokens.policy_scale + i_token)
        loss = tl.where(policy_scale != 0, loss * policy_scale, 0.0)
        coefficient = tl.where(policy_scale != 0, coefficient * policy_scale, 0.0)
    kl = 0.0
    if tokens.ref is not None:
        log_ratio = tl.load(tokens.ref + i_token) - logprob
        # expm1(x) - x without its cancellation near 0
        series = log_ratio * log_ratio * (0.5 + log_ratio * (1.0 / 6.0 + log_ratio * (1.0 / 24.0 + log_ratio / 120.0)))
        kl = tl.where(tl.abs(log_ratio) < 0.1, series, tl.exp(log_ratio) - 1.0 - log_ratio)
        kl_slope = tl.where(tl.abs(log_ratio) < 0.1, -(kl + log_ratio), 1.0 - tl.exp(log_ratio))
        if KL_TIMES_RATIO:
            kl_slope = -ratio * log_ratio
            kl = kl * ratio
        loss = tl.where(numbers.beta != 0, loss + numbers.beta * kl, loss)
        # with beta = 0, KL is logged only, and an infinite KL must not turn the loss into NaN
        coefficient = tl.where(numbers.beta != 0, coefficient + numbers.beta * kl_slope, coefficient)
    return loss, coefficient, ratio, clipped, kl
