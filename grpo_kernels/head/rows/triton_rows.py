"""The row arithmetic of the head in Triton: the functions of ``plain.py``, one program a row.

A row of V logits is read twice: once for its log-sum-exp and entropy (online, in float32), once to be turned into its
gradient in place. ``_grpo_rows_kernel`` does both with everything between them, so that one launch a tile takes logits
and group rewards to dL/dlogits: baseline, scale, advantage, ratio, clip, KL, coefficient.

The columns of a tile are padded to a multiple of 16, and the bound of every load is that padded width: only then does
the compiler know that 16 bytes at a time stay inside, whatever V is. What lies in the padding is masked by value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grpo_kernels.head.token_losses import TokenInputs, TokenLoss
from grpo_kernels.normalize.methods import METHODS
from grpo_kernels.normalize.triton_groups import group_centre_and_scale

from .plain import RowStatistics, Transform

# 16 columns a thread: two runs of 8, the half-precision values of a 16-byte access. By compile_ahead.py, on sm_90 with
# a bfloat16 gradient: 40 registers and 17 + 17 instructions an element (48 and 33 + 41 with every option), no barrier
# while summing. 8 columns a thread take 9 barriers a block and 24 + 18; 32 take 80 registers (120), so half the warps.
BLOCK_V = 4096
THREADS = 256
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)
LOWEST = tl.constexpr(-1e30)  # stands for a logit of -inf


@triton.jit
def _load_logits(
    p_row,
    p_bias,
    o_v,
    n_vocabulary,
    n_padded,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(z, d z / d y without the softcap's constant factors): logits in float32, -inf beyond the vocabulary."""
    m_padded = o_v < n_padded
    b_y = tl.load(p_row + o_v, mask=m_padded, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_v, mask=m_padded, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        # tanh(x) = 2 sigmoid(2 x) - 1
        b_tanh = 2.0 * tl.sigmoid(b_y * (2.0 * logit_scale / softcap)) - 1.0
        b_z = b_tanh * (softcap / temperature)
        b_slope = 1.0 - b_tanh * b_tanh
    else:
        b_z = b_y * (logit_scale / temperature)
        b_slope = b_z * 0.0 + 1.0
    return tl.where(o_v < n_vocabulary, b_z, float("-inf")), b_slope


@triton.jit
def _row_statistics(
    p_row,
    p_bias,
    i_target,
    n_vocabulary,
    n_padded,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(maximum, log of the sum relative to it, log-prob of the target, entropy) of a row, in one pass over it."""
    # Each thread keeps sums of its own columns, and they meet once, after the loop: a reduction over the block in every
    # round would be barriers in every round. A thread's columns are runs of 4, and BLOCK_V / 2 apart.
    LANES: tl.constexpr = BLOCK_V // 8
    b_high = tl.full((LANES,), LOWEST, tl.float32)
    b_total = tl.zeros((LANES,), tl.float32)
    b_moment = tl.zeros((LANES,), tl.float32)  # sum of e (z - high): relative to the maximum nothing large cancels
    for i_v in range(0, n_padded, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_z, _ = _load_logits(
            p_row, p_bias, o_v, n_vocabulary, n_padded, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
        )
        # finite, so that no difference below is inf - inf; NaN stays
        b_z = tl.reshape(tl.maximum(b_z, LOWEST, propagate_nan=tl.PropagateNan.ALL), (2, LANES, 4))
        b_new_high = tl.maximum(b_high, tl.max(tl.max(b_z, axis=2), axis=0))
        b_shift = b_high - b_new_high
        b_rescale = tl.exp(b_shift)
        b_d = b_z - b_new_high[None, :, None]
        b_e = tl.exp(b_d)
        if HAS_ENTROPY:
            b_moment = b_rescale * (b_moment + b_shift * b_total) + tl.sum(tl.sum(b_e * b_d, axis=2), axis=0)
        b_total = b_total * b_rescale + tl.sum(tl.sum(b_e, axis=2), axis=0)
        b_high = b_new_high
    high = tl.max(b_high, axis=0)
    b_shift = b_high - high
    b_rescale = tl.exp(b_shift)
    total = tl.sum(b_total * b_rescale, axis=0)
    log_total = tl.log(total)
    entropy = 0.0
    if HAS_ENTROPY:
        entropy = log_total - tl.sum(b_rescale * (b_moment + b_shift * b_total), axis=0) / total
    target_logit, _ = _load_logits(
        p_row, p_bias, i_target, n_vocabulary, n_padded, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    return high, log_total, (target_logit - high) - log_total, entropy


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, to float32's precision: p - 1 would keep few digits of a nearly certain token's."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1.0)


@triton.jit
def _write_gradient(
    p_row,
    p_gradient,
    p_bias,
    i_target,
    high,
    log_total,
    logprob,
    entropy,
    logprob_share,
    entropy_share,
    n_vocabulary,
    n_padded,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """logprob_share (onehot - p) - entropy_share p (log p + entropy), or p - onehot without entropy's part."""
    at_target = _expm1(logprob)
    for i_v in range(0, n_padded, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_z, b_slope = _load_logits(
            p_row, p_bias, o_v, n_vocabulary, n_padded, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
        )
        b_logp = (b_z - high) - log_total  # their sum, rounded, would cost digits where logits are large
        b_p = tl.exp(b_logp)
        b_gradient = tl.where(o_v == i_target, at_target, b_p)
        if HAS_ENTROPY_GRAD:
            b_log_term = tl.where(b_p > 0, b_p * (b_logp + entropy), 0.0)
            b_gradient = -logprob_share * b_gradient - entropy_share * b_log_term
        if HAS_SOFTCAP:
            b_gradient *= b_slope
        # the gradient may be narrower than the logits and lie in the same bytes: all of a block is read before
        # any of it is written
        tl.debug_barrier()
        tl.store(p_gradient + o_v, b_gradient.to(p_gradient.dtype.element_ty), mask=o_v < n_padded)


@triton.jit
def _softmax_rows_kernel(
    p_tile,
    stride_row,
    p_bias,
    p_targets,
    p_high,
    p_log_total,
    p_logprob,
    p_entropy,
    n_vocabulary,
    n_padded,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    high, log_total, logprob, entropy = _row_statistics(
        p_tile + i_row * stride_row,
        p_bias,
        tl.load(p_targets + i_row),
        n_vocabulary,
        n_padded,
        logit_scale,
        softcap,
        temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        HAS_ENTROPY,
        BLOCK_V,
    )
    tl.store(p_high + i_row, high)
    tl.store(p_log_total + i_row, log_total)
    tl.store(p_logprob + i_row, logprob)
    if HAS_ENTROPY:
        tl.store(p_entropy + i_row, entropy)


@triton.jit
def _logit_gradient_kernel(
    p_tile,
    stride_row,
    p_gradient,
    stride_gradient,
    p_bias,
    p_targets,
    p_high,
    p_log_total,
    p_logprob,
    p_entropy,
    p_logprob_grad,
    p_entropy_grad,
    p_factor,
    n_vocabulary,
    n_padded,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    logprob_grad = tl.load(p_logprob_grad + i_row)
    slope = logit_scale / temperature
    entropy = 0.0
    logprob_share = 0.0
    entropy_share = 0.0
    factor = -logprob_grad * slope
    if HAS_ENTROPY_GRAD:
        entropy = tl.load(p_entropy + i_row)
        entropy_grad = tl.load(p_entropy_grad + i_row)
        size = tl.abs(logprob_grad) + tl.abs(entropy_grad)
        size = tl.where(size > 0, size, 1.0)
        logprob_share = logprob_grad / size
        entropy_share = entropy_grad / size
        factor = size * slope
    tl.store(p_factor + i_row, factor)
    _write_gradient(
        p_tile + i_row * stride_row,
        p_gradient + i_row * stride_gradient,
        p_bias,
        tl.load(p_targets + i_row),
        tl.load(p_high + i_row),
        tl.load(p_log_total + i_row),
        tl.load(p_logprob + i_row),
        entropy,
        logprob_share,
        entropy_share,
        n_vocabulary,
        n_padded,
        logit_scale,
        softcap,
        temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        HAS_ENTROPY_GRAD,
        BLOCK_V,
    )


@triton.jit
def _group_advantage(
    p_rewards, position, n_generations, eps, alpha, CENTRE: tl.constexpr, SCALE: tl.constexpr, BLOCK_G: tl.constexpr
):
    """The advantage of one place of a group, (r - centre) / scale, as ``triton_groups.py`` makes it of a batch."""
    o_g = tl.arange(0, BLOCK_G)[None, :]
    b_reward = tl.load(p_rewards + o_g, mask=o_g < n_generations, other=float("nan"))
    p_group = p_rewards + tl.arange(0, 1)
    b_centre, b_scale, _ = group_centre_and_scale(
        p_group, tl.arange(0, 1) < 1, n_generations, b_reward, b_reward, eps, alpha, CENTRE, SCALE
    )
    m_own = (o_g == position) & (b_reward == b_reward)
    b_safe_scale = tl.where(b_scale > 0, b_scale, 1.0)
    b_advantage = tl.where(m_own, (b_reward - b_centre[:, None]) / b_safe_scale[:, None], 0.0)
    return tl.sum(tl.where((b_scale > 0)[:, None], b_advantage, 0.0))


@triton.jit
def _token_loss(
    logprob,
    advantage,
    old,
    ref,
    policy_scale,
    low,
    high,
    delta,
    sapo_positive,
    sapo_negative,
    beta,
    SURROGATE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_POLICY_SCALE: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
):
    """(loss, d loss / d logprob, ratio, clipped, kl) of one token: the equations of token_losses.py."""
    ratio = 1.0
    if HAS_OLD:
        ratio = tl.exp(logprob - old)
    if SURROGATE == "clip":
        capped = ratio
        first_slope = 1.0
        if HAS_DELTA:
            capped = tl.minimum(ratio, delta)
            first_slope = tl.where(ratio <= delta, 1.0, 0.0)
        first = capped * advantage
        second = tl.minimum(tl.maximum(ratio, low), high) * advantage
        loss = -tl.minimum(first, second)
        share = tl.where(first < second, 1.0, tl.where(first == second, 0.5, 0.0))
        second_slope = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
        slope = share * first_slope + (1.0 - share) * second_slope
        coefficient = tl.where(slope > 0, -slope * ratio * advantage, 0.0)
        clipped = ((capped < low) & (advantage < 0)) | ((capped > high) & (advantage > 0))
    elif SURROGATE == "cispo":
        capped = tl.minimum(ratio, high)
        loss = -capped * advantage * logprob
        coefficient = -capped * advantage
        clipped = (ratio > high) & (advantage > 0)
    else:
        steepness = tl.where(advantage > 0, sapo_positive, sapo_negative)
        gate = tl.sigmoid(steepness * (ratio - 1.0))
        loss = -gate * 4.0 / steepness * advantage
        coefficient = tl.where(gate < 1.0, -4.0 * gate * (1.0 - gate) * ratio * advantage, 0.0)
        clipped = ratio < 0
    loss = tl.where(advantage != 0, loss, 0.0)
    coefficient = tl.where(advantage != 0, coefficient, 0.0)
    if HAS_POLICY_SCALE:
        loss = tl.where(policy_scale != 0, loss * policy_scale, 0.0)
        coefficient = tl.where(policy_scale != 0, coefficient * policy_scale, 0.0)
    kl = 0.0
    if HAS_REF:
        log_ratio = ref - logprob
        # expm1(x) - x without its cancellation near 0
        series = log_ratio * log_ratio * (0.5 + log_ratio * (1.0 / 6.0 + log_ratio * (1.0 / 24.0 + log_ratio / 120.0)))
        kl = tl.where(tl.abs(log_ratio) < 0.1, series, tl.exp(log_ratio) - 1.0 - log_ratio)
        kl_slope = tl.where(tl.abs(log_ratio) < 0.1, -(kl + log_ratio), 1.0 - tl.exp(log_ratio))
        if KL_TIMES_RATIO:
            kl_slope = -ratio * log_ratio
            kl = kl * ratio
        loss = tl.where(beta != 0, loss + beta * kl, loss)
        # beta = 0 logs KL and adds nothing, however large it is
        coefficient = tl.where(beta != 0, coefficient + beta * kl_slope, coefficient)
    return loss, coefficient, ratio, clipped, kl


@triton.jit
def _grpo_rows_kernel(
    p_tile,
    stride_row,
    p_gradient,
    stride_gradient,
    p_bias,
    p_rows,  # the tokens of the tile's rows, (C,); all p_* below but the outputs are indexed by token or sequence
    p_targets,
    p_sequence,
    p_weights,
    p_advantages,
    p_rewards,
    p_position,
    p_old,
    p_ref,
    p_policy_scale,
    p_logs,  # (7, C): logprob, entropy, loss, ratio, clipped, kl, advantage
    p_factor,
    n_rows,
    n_vocabulary,
    n_padded,
    n_generations,
    eps,
    alpha,
    logit_scale,
    softcap,
    temperature,
    low,
    high,
    delta,
    sapo_positive,
    sapo_negative,
    beta,
    entropy_grad,
    CENTRE: tl.constexpr,
    SCALE: tl.constexpr,
    SURROGATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REWARDS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_POLICY_SCALE: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = tl.load(p_rows + i_row)
    i_target = tl.load(p_targets + i_token)
    largest, log_total, logprob, entropy = _row_statistics(
        p_tile + i_row * stride_row,
        p_bias,
        i_target,
        n_vocabulary,
        n_padded,
        logit_scale,
        softcap,
        temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        True,
        BLOCK_V,
    )
    if HAS_REWARDS:
        i_sequence = tl.load(p_sequence + i_token)
        advantage = _group_advantage(
            p_rewards + i_sequence * n_generations,
            tl.load(p_position + i_sequence),
            n_generations,
            eps,
            alpha,
            CENTRE,
            SCALE,
            BLOCK_G,
        )
    else:
        advantage = tl.load(p_advantages + i_token)
    old = 0.0
    ref = 0.0
    policy_scale = 1.0
    if HAS_OLD:
        old = tl.load(p_old + i_token)
    if HAS_REF:
        ref = tl.load(p_ref + i_token)
    if HAS_POLICY_SCALE:
        policy_scale = tl.load(p_policy_scale + i_token)
    loss, coefficient, ratio, clipped, kl = _token_loss(
        logprob,
        advantage,
        old,
        ref,
        policy_scale,
        low,
        high,
        delta,
        sapo_positive,
        sapo_negative,
        beta,
        SURROGATE,
        HAS_OLD,
        HAS_DELTA,
        HAS_REF,
        HAS_POLICY_SCALE,
        KL_TIMES_RATIO,
    )
    weight = tl.load(p_weights + i_token)
    coefficient = tl.where(weight != 0, coefficient * weight, 0.0)  # inf * 0 is no gradient
    loss = tl.where(weight != 0, loss * weight, 0.0)
    tl.store(p_logs + i_row, logprob)
    tl.store(p_logs + n_rows + i_row, entropy)
    tl.store(p_logs + 2 * n_rows + i_row, loss)
    tl.store(p_logs + 3 * n_rows + i_row, ratio)
    tl.store(p_logs + 4 * n_rows + i_row, tl.where(clipped, 1.0, 0.0))
    tl.store(p_logs + 5 * n_rows + i_row, kl)
    tl.store(p_logs + 6 * n_rows + i_row, advantage)
    if GRADIENT:
        factor = -coefficient * (logit_scale / temperature)
        logprob_share = 0.0
        entropy_share = 0.0
        if HAS_ENTROPY_GRAD:
            size = tl.abs(coefficient) + tl.abs(entropy_grad)
            size = tl.where(size > 0, size, 1.0)
            logprob_share = coefficient / size
            entropy_share = -entropy_grad / size
            factor = size * (logit_scale / temperature)
        tl.store(p_factor + i_row, factor)
        _write_gradient(
            p_tile + i_row * stride_row,
            p_gradient + i_row * stride_gradient,
            p_bias,
            i_target,
            largest,
            log_total,
            logprob,
            entropy,
            logprob_share,
            entropy_share,
            n_vocabulary,
            n_padded,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
            HAS_ENTROPY_GRAD,
            BLOCK_V,
        )


def _padded(tile_CV: torch.Tensor) -> int:
    """Columns up to which a row may be read: to the next multiple of 16 where the tile was made so."""
    n_vocabulary, stride = tile_CV.shape[1], tile_CV.stride(0)
    padded = -(-n_vocabulary // 16) * 16
    return padded if stride >= padded else n_vocabulary


def _padded_bias(bias: torch.Tensor | None, n_padded: int) -> torch.Tensor | None:
    if bias is None or len(bias) == n_padded:
        return bias
    return torch.nn.functional.pad(bias.detach(), (0, n_padded - len(bias)))


def _block(n_padded: int) -> int:
    return min(BLOCK_V, max(16, triton.next_power_of_2(n_padded)))


def gradient_view(tile_CV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tile as its gradient's dtype, (C, V): itself, or for half operands the first half of each float32 row."""
    if tile_CV.dtype == dtype:
        return tile_CV
    flat = tile_CV.as_strided((tile_CV.shape[0], tile_CV.stride(0)), (tile_CV.stride(0), 1))
    return flat.view(dtype)[:, : tile_CV.shape[1]]


def softmax_rows_(
    tile_CV: torch.Tensor,
    targets_C: torch.Tensor,
    transform: Transform,
    *,
    bias: torch.Tensor | None = None,
    entropy: bool = True,
    keep: bool = True,
) -> RowStatistics:
    """The rows' statistics, as in ``plain.py``; the tile stays logits, which ``logit_gradient_`` reads again."""
    high_C, log_total_C, logprob_C, entropy_C = tile_CV.new_empty((4, tile_CV.shape[0]), dtype=torch.float32)
    n_padded = _padded(tile_CV)
    if tile_CV.shape[0]:
        _softmax_rows_kernel[(tile_CV.shape[0],)](
            tile_CV,
            tile_CV.stride(0),
            _padded_bias(bias, n_padded),
            targets_C,
            high_C,
            log_total_C,
            logprob_C,
            entropy_C,
            tile_CV.shape[1],
            n_padded,
            transform.logit_scale,
            transform.softcap or 1.0,
            transform.temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_ENTROPY=entropy,
            BLOCK_V=_block(n_padded),
            num_warps=NUM_WARPS,
        )
    return RowStatistics(high_C, log_total_C, logprob_C, entropy_C if entropy else None)


def logit_gradient_(
    tile_CV: torch.Tensor,
    targets_C: torch.Tensor,
    statistics: RowStatistics,
    transform: Transform,
    logprob_grad_C: torch.Tensor,
    entropy_grad_C: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits become dL/dy up to a factor of each row: (the tile's gradient, factor (C,))."""
    gradient = gradient_view(tile_CV, dtype or tile_CV.dtype)
    factor_C = torch.empty_like(statistics.logprob)
    n_padded = _padded(tile_CV)
    if tile_CV.shape[0]:
        _logit_gradient_kernel[(tile_CV.shape[0],)](
            tile_CV,
            tile_CV.stride(0),
            gradient,
            gradient.stride(0),
            _padded_bias(bias, n_padded),
            targets_C,
            statistics.high,
            statistics.log_total,
            statistics.logprob,
            statistics.entropy,
            logprob_grad_C.float(),
            None if entropy_grad_C is None else entropy_grad_C.float(),
            factor_C,
            tile_CV.shape[1],
            n_padded,
            transform.logit_scale,
            transform.softcap or 1.0,
            transform.temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_ENTROPY_GRAD=entropy_grad_C is not None,
            BLOCK_V=_block(n_padded),
            num_warps=NUM_WARPS,
        )
    return gradient, factor_C


def grpo_rows_(
    tile_CV: torch.Tensor,
    rows: torch.Tensor | slice,
    tokens: TokenInputs,
    transform: Transform,
    *,
    bias: torch.Tensor | None,
    options: TokenLoss,
    entropy_grad: float,
    gradient: bool,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """One launch from logits and advantages (or rewards) to losses and dL/dy, as in ``plain.py``."""
    count, device = tile_CV.shape[0], tile_CV.device
    numbers = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
    logs = torch.empty((7, count), dtype=torch.float32, device=device)
    factor_C = torch.empty(count, dtype=torch.float32, device=device)
    gradient_CV = gradient_view(tile_CV, dtype or tile_CV.dtype)
    n_padded = _padded(tile_CV)
    rewards = tokens.group_rewards if tokens.advantages is None else None
    method = METHODS[rewards.method] if rewards is not None else METHODS["none"]
    n_generations = rewards.rewards.shape[1] if rewards is not None else 1
    clip = options.surrogate == "clip"
    float_or_none = [
        None if x is None else x.float() for x in (tokens.advantages, tokens.old, tokens.ref, tokens.policy_scale)
    ]
    advantages_N, old_N, ref_N, policy_scale_N = float_or_none
    _grpo_rows_kernel[(count,)](
        tile_CV,
        tile_CV.stride(0),
        gradient_CV,
        gradient_CV.stride(0),
        _padded_bias(bias, n_padded),
        numbers,
        tokens.targets,
        tokens.sequence,
        tokens.weights.float(),
        advantages_N,
        None if rewards is None else rewards.rewards.float(),
        None if rewards is None else rewards.position,
        old_N,
        ref_N,
        policy_scale_N,
        logs,
        factor_C,
        count,
        tile_CV.shape[1],
        n_padded,
        n_generations,
        0.0 if rewards is None else rewards.eps,
        1.0 if rewards is None else rewards.alpha,
        transform.logit_scale,
        transform.softcap or 1.0,
        transform.temperature,
        1.0 - options.epsilon_low,
        1.0 + options.epsilon_high if clip else options.epsilon_high,
        options.delta or 0.0,
        options.sapo_positive,
        options.sapo_negative,
        options.beta,
        entropy_grad,
        CENTRE=method.centre,
        SCALE=method.scale,
        SURROGATE=options.surrogate,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        HAS_REWARDS=rewards is not None,
        HAS_OLD=old_N is not None,
        HAS_DELTA=options.delta is not None,
        HAS_REF=ref_N is not None,
        HAS_POLICY_SCALE=policy_scale_N is not None,
        KL_TIMES_RATIO=options.kl_times_ratio,
        HAS_ENTROPY_GRAD=entropy_grad != 0,
        GRADIENT=gradient,
        BLOCK_G=triton.next_power_of_2(n_generations),
        BLOCK_V=_block(n_padded),
        num_warps=NUM_WARPS,
    )
    names = ("logprob", "entropy", "loss", "ratio", "clipped", "kl", "advantage")
    named = dict(zip(names, logs, strict=True))
    named["clipped"] = named["clipped"] > 0
    return named, gradient_CV, factor_C
