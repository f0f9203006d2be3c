"""Normalises in Triton with one launch: each program reads a block of groups once and writes their advantages.

The kernel reads and writes P * G numbers and no intermediate, so memory traffic bounds its time; at a real batch's size
(a few KB), the launch does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grpo_kernels.launch import launch

from .group_statistics import ROBUST_FLOOR
from .methods import Method
from .normalized import Normalized

# A program holds BLOCK_P x BLOCK_G values in registers: 1024 of them are 8 a thread with 4 warps, no spills.
VALUES_PER_PROGRAM = 1024
_ROBUST_FLOOR = tl.constexpr(ROBUST_FLOOR)


class Groups(NamedTuple):
    """The groups' rewards and the normalisation's numbers: tensors for the launcher, pointers in a kernel."""

    rewards: Any  # (groups, n_generations)
    n_generations: Any
    eps: Any
    alpha: Any


@triton.jit
def _places(groups, i_group, m_group, b_value, b_centre, DEVIATIONS: tl.constexpr):
    """Counts for each value how many of its group are smaller, and how many aren't larger.

    With DEVIATIONS it compares |r - centre|.

    It makes G comparisons per value. A sort needs fewer, but isn't faster for groups of up to a hundred.
    """
    b_below = b_value * 0.0
    b_up_to = b_value * 0.0
    p_group = groups.rewards + i_group * groups.n_generations
    for j in range(groups.n_generations):
        b_other = tl.load(p_group + j, mask=m_group, other=float("nan")).to(tl.float64)
        if DEVIATIONS:
            b_other = tl.abs(b_other - b_centre)
        b_below += (b_other[:, None] < b_value).to(tl.float64)
        b_up_to += (b_other[:, None] <= b_value).to(tl.float64)
    return b_below, b_up_to


@triton.jit
def _quantile(b_value, b_below, b_up_to, b_count, q):
    """Computes ``masked_quantile`` of group_statistics.py for each row of the block."""
    b_last = tl.maximum(b_count - 1.0, 0.0)
    b_place = q * b_last
    b_first = tl.floor(b_place)
    b_second = tl.minimum(b_first + 1.0, b_last)
    m_first = (b_below <= b_first[:, None]) & (b_first[:, None] < b_up_to)
    m_second = (b_below <= b_second[:, None]) & (b_second[:, None] < b_up_to)
    b_low = tl.max(tl.where(m_first, b_value, float("-inf")), axis=1)
    b_high = tl.max(tl.where(m_second, b_value, float("-inf")), axis=1)
    b_quantile = tl.where(b_high > b_low, b_low + (b_place - b_first) * (b_high - b_low), b_low)
    return tl.where(b_count > 0, b_quantile, 0.0)


@triton.jit
def group_centre_and_scale(groups, i_group, m_group, b_reward, b_length, CENTRE: tl.constexpr, SCALE: tl.constexpr):
    """Computes ``group_centre_and_scale`` of group_statistics.py, and counts, for one group per row of the block.

    NaN marks padding. It works in float64, so that a group of rewards 1000 + 0.001 u keeps its digits.
    """
    # relative to the smallest reward, so that equal rewards deviate by exactly 0
    m_scorable = b_reward == b_reward
    b_count = tl.sum(m_scorable.to(tl.float64), axis=1)
    b_low = tl.min(tl.where(m_scorable, b_reward, float("inf")), axis=1)
    b_low = tl.where(b_count > 0, b_low, 0.0)
    b_above = tl.where(m_scorable, b_reward - b_low[:, None], 0.0)
    b_mean = b_low + tl.sum(b_above, axis=1) / tl.maximum(b_count, 1.0)

    b_centre = b_mean * 0.0
    if CENTRE == "group":
        b_centre = b_mean
    elif CENTRE == "median":
        b_below, b_up_to = _places(groups, i_group, m_group, b_reward, b_mean, False)
        b_centre = _quantile(b_reward, b_below, b_up_to, b_count, 0.5)
    elif CENTRE == "lengths":
        b_weight = tl.where(m_scorable, b_length, 0.0)
        b_total = tl.sum(b_weight, axis=1)
        b_centre = b_low + tl.sum(b_weight * b_above, axis=1) / tl.where(b_total > 0, b_total, 1.0)

    b_scale = b_mean * 0.0 + 1.0
    if SCALE == "others":
        b_scale = tl.where(b_count > 1, (b_count - 1.0) / tl.maximum(b_count, 1.0), 1.0)
    elif SCALE == "mean":
        b_scale = b_mean + groups.eps
    elif SCALE == "mean_abs":
        b_deviation = tl.where(m_scorable, tl.abs(b_reward - b_mean[:, None]), 0.0)
        b_scale = tl.sum(b_deviation, axis=1) / tl.maximum(b_count, 1.0) + groups.eps
    elif SCALE == "group" or SCALE == "power" or SCALE == "mad" or SCALE == "iqr":
        b_deviation = tl.where(m_scorable, b_reward - b_mean[:, None], 0.0)
        b_std = tl.sqrt(tl.sum(b_deviation * b_deviation, axis=1) / tl.maximum(b_count - 1.0, 1.0))
        b_spread = b_std
        if SCALE == "mad":
            b_distance = tl.abs(b_reward - b_centre[:, None])
            b_below, b_up_to = _places(groups, i_group, m_group, b_distance, b_centre, True)
            b_spread = _quantile(b_distance, b_below, b_up_to, b_count, 0.5)
        elif SCALE == "iqr":  # CENTRE is the median, which has computed the places
            b_upper = _quantile(b_reward, b_below, b_up_to, b_count, 0.75)
            b_spread = b_upper - _quantile(b_reward, b_below, b_up_to, b_count, 0.25)
        b_scale = tl.where(b_spread > b_std * _ROBUST_FLOOR, b_spread, b_std) + groups.eps
        if SCALE == "power":
            b_scale = tl.where(b_scale > 0, tl.exp(groups.alpha * tl.log(tl.where(b_scale > 0, b_scale, 1.0))), 0.0)
    return b_centre, b_scale, b_count


@triton.jit
def _normalize_kernel(
    groups,
    n_groups,
    p_lengths,
    p_advantages,
    p_centre,  # (P,), read if given, else written
    p_scale,
    CENTRE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_g = tl.arange(0, BLOCK_G)
    m_p = i_p < n_groups
    o_pg = i_p[:, None] * groups.n_generations + i_g[None, :]
    m_inside = m_p[:, None] & (i_g < groups.n_generations)[None, :]
    b_reward = tl.load(groups.rewards + o_pg, mask=m_inside, other=float("nan")).to(tl.float64)
    m_scorable = b_reward == b_reward  # NaN: padding, or a completion that could not be scored
    b_length = b_reward
    if CENTRE == "lengths":
        b_length = tl.load(p_lengths + o_pg, mask=m_inside, other=0.0).to(tl.float64)
    b_centre, b_scale, b_count = group_centre_and_scale(groups, i_p, m_p, b_reward, b_length, CENTRE, SCALE)

    if CENTRE == "given":
        b_centre = tl.load(p_centre + i_p, mask=m_p, other=0.0)
    elif SCALE != "rank":
        tl.store(p_centre + i_p, b_centre, mask=m_p)
    if SCALE == "given":
        b_scale = tl.load(p_scale + i_p, mask=m_p, other=1.0)
    elif SCALE != "rank":
        tl.store(p_scale + i_p, b_scale, mask=m_p)

    if SCALE == "rank":
        # twice the mid-rank is 1 + (how many are smaller) + (how many are not larger, itself too)
        b_below, b_up_to = _places(groups, i_p, m_p, b_reward, b_centre, False)
        b_advantage = (b_below + b_up_to - b_count[:, None]) / tl.maximum(b_count - 1.0, 1.0)[:, None]
    else:
        b_safe_scale = tl.where(b_scale > 0, b_scale, 1.0)
        b_quotient = (b_reward - b_centre[:, None]) / b_safe_scale[:, None]
        b_advantage = tl.where((b_scale > 0)[:, None], b_quotient, 0.0)

    tl.store(p_advantages + o_pg, tl.where(m_scorable, b_advantage, 0.0), mask=m_inside)


def normalize_groups(
    rewards_PG: torch.Tensor,
    method: Method,
    eps: float,
    alpha: float,
    centre_P1: torch.Tensor | None,
    scale_P1: torch.Tensor | None,
    lengths_PG: torch.Tensor | None,
) -> Normalized:
    """Launches the kernel. Takes the arguments of ``_normalize_torch``; returns float64."""
    advantages_PG = torch.empty(rewards_PG.shape, dtype=rewards_PG.dtype, device=rewards_PG.device)
    n_groups, n_generations = rewards_PG.shape
    if method.scale == "rank":  # has no centre and scale
        centre_P1 = scale_P1 = rewards_PG.new_full((n_groups, 1), float("nan"))
    centre_P, scale_P = (
        advantages_PG.new_empty(n_groups) if given is None else given.double().flatten()
        for given in (centre_P1, scale_P1)
    )
    block_g = triton.next_power_of_2(n_generations)
    block_p = max(1, VALUES_PER_PROGRAM // block_g)
    launch(
        _normalize_kernel,
        (triton.cdiv(n_groups, block_p),),
        Groups(rewards_PG, n_generations, eps, alpha),
        n_groups,
        lengths_PG,
        advantages_PG,
        centre_P,
        scale_P,
        CENTRE=method.centre,
        SCALE=method.scale,
        BLOCK_P=block_p,
        BLOCK_G=block_g,
    )
    return Normalized(advantages_PG, centre_P, scale_P)
