"""Computes the head's row arithmetic in Triton: the functions of ``plain.py``, with one program per row.

A program reads its row of V logits twice: once for log-sum-exp and entropy (online, in float32), and once to replace it
by its gradient in place. ``_grpo_rows_kernel`` does both and all steps between them in one launch per tile, from logits
and group rewards to dL/dlogits: baseline, scale, advantage, ratio, clip, KL, coefficient.

The columns of a tile are padded to a multiple of 16, and that padded width bounds every load. Only then can the
compiler prove that loads of 16 bytes stay inside the row, whatever V is. The kernels mask the values in the padding.

Arguments of the kernels are named tuples (``triton_arguments.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grpo_kernels.head.token_losses import GroupRewards, TokenInputs, TokenLoss
from grpo_kernels.launch import launch
from grpo_kernels.normalize.methods import METHODS
from grpo_kernels.normalize.triton_groups import Groups, group_centre_and_scale

from .plain import RowStatistics, Transform
from .triton_arguments import Gradient, Logs, Tile
from .triton_token_loss import LossNumbers, Tokens, token_loss

# 16 columns per thread: two runs of 8, which is the number of half-precision values in a 16-byte access. Measured by
# compile_ahead.py for sm_90 with a bfloat16 gradient, at the worst of its vocabularies (in brackets: with every
# option): 38 registers (48), 17 + 18 instructions per element (33 + 42), no barrier while summing. With 8 columns per
# thread: 9 barriers per block, 24 + 18 instructions (41 + 44). With 32: 80 registers (122), so half the warps.
BLOCK_V = 4096
THREADS = 256
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)
LOWEST = tl.constexpr(-1e30)  # replaces a logit of -inf


@triton.jit
def _tanh(x):
    """Computes tanh to a few units in float32's last place.

    It is 2 sigmoid(2 x) - 1, or near 0, where that cancels, the first eight terms of the series, whose relative error
    is below 1e-8.
    """
    square = x * x
    series = 62 / 2835 + square * (-1382 / 155925 + square * (21844 / 6081075 - square * (929569 / 638512875)))
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * series)))
    return tl.where(tl.abs(x) < 0.5, x * series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _load_logits(tile, i_row, o_v):
    """Loads logits z in float32 (-inf beyond the vocabulary), and dz/dy without constant factors."""
    m_padded = o_v < tile.n_padded
    b_y = tl.load(tile.products + i_row * tile.stride + o_v, mask=m_padded, other=0.0).to(tl.float32)
    if tile.bias is not None:
        b_y += tl.load(tile.bias + o_v, mask=m_padded, other=0.0).to(tl.float32)
    logit_scale, temperature, softcap = tile.transform.logit_scale, tile.transform.temperature, tile.transform.softcap
    if softcap is not None:
        b_tanh = _tanh(b_y * (logit_scale / softcap))
        b_z = b_tanh * (softcap / temperature)
        b_slope = 1.0 - b_tanh * b_tanh
    else:
        b_z = b_y * (logit_scale / temperature)
        b_slope = 1.0
    return tl.where(o_v < tile.n_vocabulary, b_z, float("-inf")), b_slope


@triton.jit
def _row_statistics(tile, i_row, i_target, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """Computes the ``RowStatistics`` of a row in one pass."""
    # Each thread sums its own columns, and one reduction after the loop adds the sums up: a reduction in every round
    # would need barriers in every round. A thread's columns are runs of 4 that are BLOCK_V / 2 apart.
    LANES: tl.constexpr = BLOCK_V // 8
    b_high = tl.full((LANES,), LOWEST, tl.float32)
    b_total = tl.zeros((LANES,), tl.float32)
    b_moment = tl.zeros((LANES,), tl.float32)  # sum of e (z - high); relative to the maximum it doesn't cancel
    for i_v in range(0, tile.n_padded, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_z, _ = _load_logits(tile, i_row, o_v)
        # makes logits finite, so that no difference is inf - inf; NaN stays NaN
        b_z = tl.reshape(tl.maximum(b_z, LOWEST, propagate_nan=tl.PropagateNan.ALL), (2, LANES, 4))
        b_new_high = tl.maximum(b_high, tl.max(tl.max(b_z, axis=2), axis=0))
        b_shift = b_high - b_new_high
        b_rescale = tl.exp(b_shift)
        b_d = b_z - b_new_high[None, :, None]
        b_e = tl.exp(b_d)
        if ENTROPY:
            b_moment = b_rescale * (b_moment + b_shift * b_total) + tl.sum(tl.sum(b_e * b_d, axis=2), axis=0)
        b_total = b_total * b_rescale + tl.sum(tl.sum(b_e, axis=2), axis=0)
        b_high = b_new_high
    high = tl.max(b_high, axis=0)
    b_shift = b_high - high
    b_rescale = tl.exp(b_shift)
    total = tl.sum(b_total * b_rescale, axis=0)
    log_total = tl.log(total)
    entropy = 0.0
    if ENTROPY:
        entropy = log_total - tl.sum(b_rescale * (b_moment + b_shift * b_total), axis=0) / total
    target_logit, _ = _load_logits(tile, i_row, i_target)
    return RowStatistics(high, log_total, (target_logit - high) - log_total, entropy)  # type: ignore[arg-type]


@triton.jit
def _expm1(x):
    """Computes exp(x) - 1 for x <= 0 to float32's precision; p - 1 would cancel for a nearly certain token."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1.0)


@triton.jit
def _write_gradient(tile, gradient, i_row, i_target, row, logprob_grad, entropy_grad, BLOCK_V: tl.constexpr):
    """Writes dL/dy of a row, divided by its factor, and the factor.

    Without entropy: p - onehot. With entropy: c (onehot - p) - e p (log p + entropy), divided by |c| + |e|.
    """
    slope = tile.transform.logit_scale / tile.transform.temperature
    factor = -logprob_grad * slope
    if entropy_grad is not None:
        size = tl.abs(logprob_grad) + tl.abs(entropy_grad)
        size = tl.where(size > 0, size, 1.0)
        logprob_share = logprob_grad / size
        entropy_share = entropy_grad / size
        factor = size * slope
    tl.store(gradient.factor + i_row, factor)
    at_target = _expm1(row.logprob)
    p_gradient = gradient.rows + i_row * gradient.stride
    for i_v in range(0, tile.n_padded, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_z, b_slope = _load_logits(tile, i_row, o_v)
        b_logp = (b_z - row.high) - row.log_total  # high + log_total, rounded, would lose digits of large logits
        b_p = tl.exp(b_logp)
        b_gradient = tl.where(o_v == i_target, at_target, b_p)
        if entropy_grad is not None:
            b_log_term = tl.where(b_p > 0, b_p * (b_logp + row.entropy), 0.0)
            b_gradient = -logprob_share * b_gradient - entropy_share * b_log_term
        b_gradient *= b_slope
        # The gradient may be narrower than the logits and share their memory: the whole block must be read before any
        # of it is written.
        tl.debug_barrier()
        tl.store(p_gradient + o_v, b_gradient.to(p_gradient.dtype.element_ty), mask=o_v < tile.n_padded)


@triton.jit
def _softmax_rows_kernel(tile, p_targets, statistics, BLOCK_V: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    row = _row_statistics(tile, i_row, tl.load(p_targets + i_row), statistics.entropy is not None, BLOCK_V)
    tl.store(statistics.high + i_row, row.high)
    tl.store(statistics.log_total + i_row, row.log_total)
    tl.store(statistics.logprob + i_row, row.logprob)
    if statistics.entropy is not None:
        tl.store(statistics.entropy + i_row, row.entropy)


@triton.jit
def _logit_gradient_kernel(
    tile, p_targets, statistics, p_logprob_grad, p_entropy_grad, gradient, BLOCK_V: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    entropy = None
    entropy_grad = None
    if p_entropy_grad is not None:
        entropy = tl.load(statistics.entropy + i_row)
        entropy_grad = tl.load(p_entropy_grad + i_row)
    row = RowStatistics(
        tl.load(statistics.high + i_row),
        tl.load(statistics.log_total + i_row),
        tl.load(statistics.logprob + i_row),
        entropy,
    )
    i_target = tl.load(p_targets + i_row)
    logprob_grad = tl.load(p_logprob_grad + i_row)
    _write_gradient(tile, gradient, i_row, i_target, row, logprob_grad, entropy_grad, BLOCK_V)


@triton.jit
def _group_advantage(groups, i_group, position, CENTRE: tl.constexpr, SCALE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Computes the advantage of one position of a group, (r - centre) / scale, as ``triton_groups.py`` does."""
    o_g = tl.arange(0, BLOCK_G)[None, :]
    p_group = groups.rewards + i_group * groups.n_generations
    b_reward = tl.load(p_group + o_g, mask=o_g < groups.n_generations, other=float("nan")).to(tl.float64)
    o_one = tl.arange(0, 1)
    b_centre, b_scale, _ = group_centre_and_scale(groups, i_group + o_one, o_one < 1, b_reward, b_reward, CENTRE, SCALE)
    m_own = (o_g == position) & (b_reward == b_reward)
    b_safe_scale = tl.where(b_scale > 0, b_scale, 1.0)
    b_advantage = tl.where(m_own, (b_reward - b_centre[:, None]) / b_safe_scale[:, None], 0.0)
    return tl.sum(tl.where((b_scale > 0)[:, None], b_advantage, 0.0)).to(tl.float32)


@triton.jit
def _grpo_rows_kernel(
    tile,
    tokens,
    groups,  # or None
    numbers,
    logs,
    gradient,  # or None
    CENTRE: tl.constexpr,
    SCALE: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = tl.load(tokens.rows + i_row)
    i_target = tl.load(tokens.targets + i_token)
    row = _row_statistics(tile, i_row, i_target, True, BLOCK_V)
    if groups is not None:
        i_sequence = tl.load(tokens.sequence + i_token)
        position = tl.load(tokens.position + i_sequence)
        advantage = _group_advantage(groups, i_sequence, position, CENTRE, SCALE, BLOCK_G)
    else:
        advantage = tl.load(tokens.advantages + i_token)
    loss, coefficient, ratio, clipped, kl = token_loss(
        tokens, i_token, row.logprob, advantage, numbers, SURROGATE, KL_TIMES_RATIO
    )
    weight = tl.load(tokens.weights + i_token)
    coefficient = tl.where(weight != 0, coefficient * weight, 0.0)  # 0, not inf * 0 = NaN
    loss = tl.where(weight != 0, loss * weight, 0.0)
    tl.store(logs.logprob + i_row, row.logprob)
    tl.store(logs.entropy + i_row, row.entropy)
    tl.store(logs.loss + i_row, loss)
    tl.store(logs.ratio + i_row, ratio)
    tl.store(logs.clipped + i_row, tl.where(clipped, 1.0, 0.0))
    tl.store(logs.kl + i_row, kl)
    tl.store(logs.advantage + i_row, advantage)
    if gradient is not None:
        _write_gradient(tile, gradient, i_row, i_target, row, coefficient, numbers.entropy_grad, BLOCK_V)


def _tile(tile_CV: torch.Tensor, bias: torch.Tensor | None, transform: Transform) -> Tile:
    """Makes the kernel's ``Tile``; rows are read to a multiple of 16 columns if the tile has that padding."""
    n_vocabulary, stride = tile_CV.shape[1], tile_CV.stride(0)
    n_padded = -(-n_vocabulary // 16) * 16
    if stride < n_padded:
        n_padded = n_vocabulary
    if bias is not None and len(bias) != n_padded:
        bias = torch.nn.functional.pad(bias.detach(), (0, n_padded - len(bias)))
    return Tile(tile_CV, stride, bias, n_padded, n_vocabulary, transform)


def _columns(number: int, count: int, device: torch.device) -> torch.Tensor:
    """Returns ``number`` undefined float32 vectors (count,), each aligned to 64 bytes.

    Triton compiles a kernel for each alignment of its pointers, so alignment must not depend on the number of rows.
    """
    return torch.empty((number, -(-count // 16) * 16), dtype=torch.float32, device=device)[:, :count]


def _block(n_padded: int) -> int:
    return min(BLOCK_V, max(16, triton.next_power_of_2(n_padded)))


def _gradient(tile_CV: torch.Tensor, dtype: torch.dtype | None, out: torch.Tensor | None) -> Gradient:
    """Makes the kernel's ``Gradient``, in ``out`` or in the tile: half precision in the first half of a float32 row."""
    rows_CV = tile_CV if out is None else out
    if out is None and dtype is not None and dtype != tile_CV.dtype:
        rows = tile_CV.as_strided((tile_CV.shape[0], tile_CV.stride(0)), (tile_CV.stride(0), 1))
        rows_CV = rows.view(dtype)[:, : tile_CV.shape[1]]
    return Gradient(rows_CV, rows_CV.stride(0), torch.empty(len(tile_CV), dtype=torch.float32, device=tile_CV.device))


def softmax_rows_(
    tile_CV: torch.Tensor,
    targets_C: torch.Tensor,
    transform: Transform,
    *,
    bias: torch.Tensor | None = None,
    entropy: bool = True,
    keep: bool = True,
) -> RowStatistics:
    """Computes row statistics as in ``plain.py``, but leaves the tile as it is; ``logit_gradient_`` reads it again."""
    high_C, log_total_C, logprob_C, entropy_C = _columns(4, tile_CV.shape[0], tile_CV.device)
    statistics = RowStatistics(high_C, log_total_C, logprob_C, entropy_C if entropy else None)
    tile = _tile(tile_CV, bias, transform)
    if tile_CV.shape[0]:
        launch(
            _softmax_rows_kernel,
            (tile_CV.shape[0],),
            tile,
            targets_C,
            statistics,
            BLOCK_V=_block(tile.n_padded),
            num_warps=NUM_WARPS,
        )
    return statistics


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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces the products in the tile by dL/dy divided by a factor of each row, or writes it to ``out``.

    Returns it and the factor (C,).
    """
    tile, gradient = _tile(tile_CV, bias, transform), _gradient(tile_CV, dtype, out)
    if tile_CV.shape[0]:
        launch(
            _logit_gradient_kernel,
            (tile_CV.shape[0],),
            tile,
            targets_C,
            statistics,
            logprob_grad_C.float(),
            None if entropy_grad_C is None else entropy_grad_C.float(),
            gradient,
            BLOCK_V=_block(tile.n_padded),
            num_warps=NUM_WARPS,
        )
    return gradient.rows, gradient.factor


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
    out: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Computes losses and dL/dy from products and advantages (or rewards) in one launch, as in ``plain.py``.

    dL/dy is written to ``out`` if that isn't None.
    """
    count, device = tile_CV.shape[0], tile_CV.device
    rewards = tokens.group_rewards if tokens.advantages is None else None
    method = METHODS["none" if rewards is None else rewards.method]
    groups = None
    if rewards is not None:
        groups = Groups(rewards.rewards.float(), rewards.rewards.shape[1], rewards.eps, rewards.alpha)
    logs = Logs(*_columns(7, count, device))
    tile, output = _tile(tile_CV, bias, transform), _gradient(tile_CV, dtype, out)
    launch(
        _grpo_rows_kernel,
        (count,),
        tile,
        _tokens(tokens, rows, rewards, device),
        groups,
        _loss_numbers(options, entropy_grad),
        logs,
        output if gradient else None,
        CENTRE=method.centre,
        SCALE=method.scale,
        SURROGATE=options.surrogate,
        KL_TIMES_RATIO=options.kl_times_ratio,
        BLOCK_G=1 if groups is None else triton.next_power_of_2(groups.n_generations),
        BLOCK_V=_block(tile.n_padded),
        num_warps=NUM_WARPS,
    )
    return {**logs._asdict(), "clipped": logs.clipped > 0}, output.rows, output.factor


def _tokens(
    tokens: TokenInputs, rows: torch.Tensor | slice, rewards: GroupRewards | None, device: torch.device
) -> Tokens:
    advantages_N, old_N, ref_N, policy_scale_N = (
        None if x is None else x.float() for x in (tokens.advantages, tokens.old, tokens.ref, tokens.policy_scale)
    )
    return Tokens(
        rows=torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows,
        targets=tokens.targets,
        sequence=tokens.sequence,
        position=None if rewards is None else rewards.position,
        weights=tokens.weights.float(),
        advantages=advantages_N,
        old=old_N,
        ref=ref_N,
        policy_scale=policy_scale_N,
    )


def _loss_numbers(options: TokenLoss, entropy_grad: float) -> LossNumbers:
    return LossNumbers(
        low=1.0 - options.epsilon_low,
        high=1.0 + options.epsilon_high if options.surrogate == "clip" else options.epsilon_high,
        delta=options.delta,
        sapo_positive=options.sapo_positive,
        sapo_negative=options.sapo_negative,
        beta=options.beta,
        entropy_grad=-entropy_grad if entropy_grad else None,
    )
