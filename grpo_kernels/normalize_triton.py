"""Normalisation in Triton: one launch, each program reads a block of whole groups once and writes their advantages.

P * G numbers in, P * G numbers out, nothing between: the launch is bound by memory traffic, and at the sizes of a
real batch (a few KB) by the launch itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .normalize import Method

# A program holds BLOCK_P x BLOCK_G values in registers: 1024 of them are 8 a thread with 4 warps, no spills.
VALUES_PER_PROGRAM = 1024


@triton.jit
def _normalize_kernel(
    p_rewards,
    p_advantages,
    p_batch,  # batch mean, batch std
    n_groups,
    n_generations,
    eps,
    alpha,
    CENTRE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_g = tl.arange(0, BLOCK_G)
    o_pg = i_p[:, None] * n_generations + i_g[None, :]
    m_inside = (i_p < n_groups)[:, None] & (i_g < n_generations)[None, :]
    b_reward = tl.load(p_rewards + o_pg, mask=m_inside, other=float("nan"))
    m_scorable = b_reward == b_reward  # NaN: padding, or a completion that could not be scored

    # the statistics of masked_statistics() in normalize.py, relative to the range
    b_count = tl.sum(m_scorable.to(b_reward.dtype), axis=1)
    b_high = tl.max(tl.where(m_scorable, b_reward, float("-inf")), axis=1)
    b_low = tl.min(tl.where(m_scorable, b_reward, float("inf")), axis=1)
    b_width = tl.where(b_count > 0, b_high - b_low, 0.0)
    b_offset = tl.where(b_count > 0, b_low, 0.0)
    b_safe = tl.where(b_width > 0, b_width, 1.0)
    b_relative = tl.where(m_scorable, (b_reward - b_offset[:, None]) / b_safe[:, None], 0.0)
    b_relative_mean = tl.sum(b_relative, axis=1) / tl.maximum(b_count, 1.0)
    b_mean = tl.where(b_width > 0, b_offset + b_width * b_relative_mean, b_offset)

    if CENTRE == "zero":
        b_centered = b_reward
    elif CENTRE == "batch":
        b_centered = b_reward - tl.load(p_batch)
    else:
        b_centered = b_reward - b_mean[:, None]
        if CENTRE == "others":
            b_centered = b_centered * (b_count / tl.maximum(b_count - 1.0, 1.0))[:, None]

    if SCALE == "one":
        b_advantage = b_centered
    else:
        if SCALE == "batch":
            b_scale = b_mean * 0.0 + (tl.load(p_batch + 1) + eps)
        else:
            b_deviation = tl.where(m_scorable, b_relative - b_relative_mean[:, None], 0.0)
            b_variance = tl.sum(b_deviation * b_deviation, axis=1) / tl.maximum(b_count - 1.0, 1.0)
            b_scale = tl.where(b_width > 0, b_width * tl.sqrt(b_variance), 0.0) + eps
            if SCALE == "power":
                b_scale = tl.where(b_scale > 0, tl.exp(alpha * tl.log(tl.where(b_scale > 0, b_scale, 1.0))), 0.0)
        b_safe_scale = tl.where(b_scale > 0, b_scale, 1.0)
        b_advantage = tl.where((b_scale > 0)[:, None], b_centered / b_safe_scale[:, None], 0.0)

    tl.store(p_advantages + o_pg, tl.where(m_scorable, b_advantage, 0.0), mask=m_inside)


def normalize_groups(
    rewards_PG: torch.Tensor,
    method: Method,
    eps: float,
    alpha: float,
    batch_mean: torch.Tensor,
    batch_std: torch.Tensor,
) -> torch.Tensor:
    """Launches the kernel on float32 rewards; arguments as ``_normalize_torch``."""
    rewards_PG = rewards_PG.contiguous()
    advantages_PG = torch.empty_like(rewards_PG)
    n_groups, n_generations = rewards_PG.shape
    block_g = triton.next_power_of_2(n_generations)
    block_p = max(1, VALUES_PER_PROGRAM // block_g)
    _normalize_kernel[(triton.cdiv(n_groups, block_p),)](
        rewards_PG,
        advantages_PG,
        torch.stack([batch_mean, batch_std]),
        n_groups,
        n_generations,
        eps,
        alpha,
        CENTRE=method.centre,
        SCALE=method.scale,
        BLOCK_P=block_p,
        BLOCK_G=block_g,
    )
    return advantages_PG
