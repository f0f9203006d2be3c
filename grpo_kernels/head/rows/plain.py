"""Computes the head's row arithmetic in plain torch: turns a tile of logits into probabilities, then into dL/dlogits.

Shapes: C rows (tokens) of a tile, V vocabulary. The tile changes in place. The arithmetic is in float32 (float64 for
float64), whatever the tile's dtype. It works on groups of rows that fit into the processor's cache, so that the tile is
read from and written to memory once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from grpo_kernels.head.token_losses import TokenInputs, TokenLoss, token_losses

# The size of a group of rows, which stays in the cache, with its scratch memory, between passes. Relative time of the
# whole loss in fp32 and bf16, measured on two cores with 1 MiB of L2 and 32 MiB of L3 cache: 256 KiB 1.10, 1.20; 1 MiB
# 1.07, 1.13; 2 MiB 1.05, 1.02; 4 MiB 1.00, 1.00; 16 MiB 1.12, 1.11; the whole tile 1.23, 1.50.
GROUP_BYTES = 4 << 20


class Transform(NamedTuple):
    """How products y = hidden . weight become logits: ``z = softcap * tanh(logit_scale * y / softcap) / temperature``.

    It is a tuple, like ``RowStatistics``, because Triton kernels take tuples as arguments.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def slope(self) -> float:
        """dz/dy without the softcap's factor."""
        return self.logit_scale / self.temperature


class RowStatistics(NamedTuple):
    """Statistics of each row, (C,), in nats.

    ``high + log_total`` is the log-sum-exp. Kept apart, they lose no digits if logits are large.
    """

    high: torch.Tensor  # the largest logit
    log_total: torch.Tensor  # log(sum exp(logit - high))
    logprob: torch.Tensor  # of the target
    entropy: torch.Tensor | None


def _groups(tile: torch.Tensor, work_dtype: torch.dtype):
    """Returns slices of the tile's rows, each of at most ``GROUP_BYTES`` in ``work_dtype``."""
    rows = max(1, GROUP_BYTES // max(1, tile.shape[1] * work_dtype.itemsize))
    return [slice(start, min(start + rows, tile.shape[0])) for start in range(0, tile.shape[0], rows)]


def softmax_rows_(
    tile_CV: torch.Tensor,
    targets_C: torch.Tensor,
    transform: Transform,
    *,
    bias: torch.Tensor | None = None,
    entropy: bool = True,
    keep: bool = True,
) -> RowStatistics:
    """Replaces the products in the tile by probabilities (with a softcap by the tanh), and returns row statistics.

    Without ``keep`` the tile's content is undefined afterwards.

    The same in plain torch, with z the logits: ``tile.copy_(z.softmax(1))``, ``z.logsumexp(1)``,
    ``z.log_softmax(1).gather(1, targets)`` and ``-(p * log p).sum(1)``.
    """
    work_dtype = torch.promote_types(tile_CV.dtype, torch.float32)
    count = tile_CV.shape[0]
    high_C, log_total_C, logprob_C = torch.empty((3, count), dtype=work_dtype, device=tile_CV.device)
    entropy_C = torch.empty_like(high_C) if entropy else None
    groups = _groups(tile_CV, work_dtype)
    shape = (groups[0].stop if groups else 0, tile_CV.shape[1])
    wanted = (True, tile_CV.dtype != work_dtype, transform.softcap is not None)
    scratch, wide, capped = (
        torch.empty(shape if want else 0, dtype=work_dtype, device=tile_CV.device) for want in wanted
    )
    for rows in groups:
        tile = tile_CV[rows]
        z = _logits(tile, transform, bias, wide, capped, keep)
        high = z.amax(1, keepdim=True)
        d = torch.sub(z, high, out=scratch[: z.shape[0]])
        logprob = d.gather(1, targets_C[rows, None])
        if bias is not None:
            d.clamp_(min=-1e30)  # a bias of -inf masks a column, with probability 0; 0 * -inf would be NaN
        p, log_total = _softmax(d, z, fast=tile.dtype != work_dtype)
        high_C[rows], log_total_C[rows] = high.squeeze(1), log_total.squeeze(1)
        logprob_C[rows] = (logprob - log_total).squeeze(1)
        if entropy_C is not None:
            entropy_C[rows] = log_total.squeeze(1) - torch.linalg.vecdot(p, d)
        if keep and transform.softcap is None and tile is not p:
            tile.copy_(p)
    return RowStatistics(high_C, log_total_C, logprob_C, entropy_C)


def _softmax(d: torch.Tensor, out: torch.Tensor, fast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the softmax of rows whose largest value is 0, in ``out``, and the log of its denominator (C, 1).

    Args:
        fast: whether to use torch's softmax, one pass in place of three. Its exp is wrong by up to 20 units in
            float32's last place, far below a half-precision tile's rounding. The whole row pass takes 0.76 of the time.
    """
    if fast:
        p = torch.softmax(d, 1, out=out)
        return p, p.amax(1, keepdim=True).log_().neg_()  # the largest is 1 / denominator
    e = torch.exp(d, out=out)
    total = e.sum(1, keepdim=True)
    return e.mul_(total.reciprocal()), total.log()


def _logits(
    tile: torch.Tensor,
    transform: Transform,
    bias: torch.Tensor | None,
    wide: torch.Tensor,
    capped: torch.Tensor,
    keep: bool,
) -> torch.Tensor:
    """Returns the logits of a group of rows, in the tile's memory or in that of ``wide`` or ``capped``."""
    z = tile if not wide.numel() else wide[: len(tile)].copy_(tile)
    if bias is not None:
        z.add_(bias)
    if transform.softcap is not None:
        z.mul_(transform.logit_scale / transform.softcap).tanh_()
        if keep and tile is not z:
            tile.copy_(z)
        return torch.mul(z, transform.softcap / transform.temperature, out=capped[: len(z)])
    return z if transform.slope == 1.0 else z.mul_(transform.slope)


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
    """Replaces the tile of ``softmax_rows_`` by dL/dy divided by a factor of each row.

    With c = dL/dlogprob and e = dL/dentropy, ``dL/dz_j = c (1[j = target] - p_j) - e p_j (log p_j + entropy)``. Without
    e, the tile holds p - onehot and the factor holds -c: a c of 1e-9 would underflow in a half-precision tile.

    Args:
        bias, dtype, out: for the Triton backend only. Its tile still holds products, and may be wider than the
            operands; it writes dL/dy to ``out``, (C, V) in the operands' dtype, if that isn't None.

    Returns:
        The tile, and the factor (C,) in float32 (float64 for float64).
    """
    index = targets_C[:, None]
    at_target = torch.exp(statistics.logprob)[:, None]
    if entropy_grad_C is None:
        factor_C = -logprob_grad_C * transform.slope
        if transform.softcap is None:
            # only the target's column changes; scatter_ would copy a half-precision tile
            tile_CV[torch.arange(len(targets_C), device=tile_CV.device), targets_C] = torch.expm1(
                statistics.logprob
            ).to(tile_CV.dtype)
            return tile_CV, factor_C
        size_C = None
    else:
        size_C = logprob_grad_C.abs() + entropy_grad_C.abs()
        size_C = torch.where(size_C > 0, size_C, 1.0)
        factor_C = size_C * transform.slope
    for rows in _groups(tile_CV, statistics.logprob.dtype):
        tile = tile_CV[rows]
        p, logp, entropy, cap_slope = _probabilities(tile, rows, statistics, transform)
        p.scatter_(1, index[rows], at_target[rows])
        if size_C is not None and entropy_grad_C is not None and entropy is not None:
            if transform.softcap is None:  # float16 may have rounded the target's p to 0
                logp.scatter_(1, index[rows], statistics.logprob[rows, None])
            c, e = (g[rows, None] / size_C[rows, None] for g in (logprob_grad_C, entropy_grad_C))
            log_term = logp.clamp_(min=-1e30).add_(entropy).mul_(p).mul_(e)
            p.mul_(-c)
            p.scatter_add_(1, index[rows], c.to(p.dtype))
            p.sub_(log_term)
        else:
            p.scatter_(1, index[rows], torch.expm1(statistics.logprob[rows])[:, None])
        tile.copy_(p if cap_slope is None else p.mul_(cap_slope))
    return tile_CV, factor_C


def _probabilities(
    tile: torch.Tensor, rows: slice, statistics: RowStatistics, transform: Transform
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns p and log p of a group of rows, their entropies, and the softcap's slope, from what softmax_rows_ left.

    With a softcap the tile holds tanh(y logit_scale / softcap), whose slope is 1 - tanh^2.
    """
    p = tile.to(statistics.logprob.dtype, copy=True)
    entropy = None if statistics.entropy is None else statistics.entropy[rows, None]
    rounded = tile.dtype != p.dtype  # what the tile holds was rounded, so probabilities are normalised again
    if transform.softcap is None:
        if rounded:
            p.div_(p.sum(1, keepdim=True))
        logp = p.log()
        if rounded and entropy is not None:
            entropy = -torch.linalg.vecdot(p, logp.clamp(min=-1e30))[:, None]
        return p, logp, entropy, None
    cap_slope = 1 - p.square()
    logp = p.mul_(transform.softcap / transform.temperature).sub_(statistics.high[rows, None])
    logp.sub_(statistics.log_total[rows, None])
    if rounded:
        logp.sub_(logp.logsumexp(1, keepdim=True)).clamp_(min=-1e30)
    p = logp.exp()
    if rounded and entropy is not None:
        entropy = -torch.linalg.vecdot(p, logp)[:, None]
    return p, logp, entropy, cap_slope


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
    """Computes losses of the tile's rows, and replaces the products in the tile by dL/dy divided by a factor per row.

    Args:
        rows: the tokens that the tile's rows belong to.
        entropy_grad: -dL/dentropy of every token.
        gradient: whether to compute dL/dy; if not, the tile's content is undefined afterwards.
        dtype, out: for the Triton backend only, as in ``logit_gradient_``.

    Returns:
        Values to log by name, (C,) each; the tile; the factor (C,).
    """
    targets_C = tokens.targets[rows]
    statistics = softmax_rows_(tile_CV, targets_C, transform, bias=bias, keep=gradient)
    dtype = statistics.logprob.dtype
    advantages_C, weights_C = tokens.token_advantages()[rows].to(dtype, copy=True), tokens.weights[rows].to(dtype)
    old_C, ref_C, policy_scale_C = (
        None if x is None else x[rows].to(dtype) for x in (tokens.old, tokens.ref, tokens.policy_scale)
    )
    losses = token_losses(statistics.logprob, advantages_C, old_C, ref_C, policy_scale_C, options)
    assert statistics.entropy is not None
    logs = {
        "logprob": statistics.logprob,
        "entropy": statistics.entropy,
        "loss": torch.where(weights_C != 0, losses.loss * weights_C, 0.0),  # 0, not inf * 0 = NaN
        "ratio": losses.ratio,
        "clipped": losses.clipped,
        "advantage": advantages_C,
    }
    if losses.kl is not None:
        logs["kl"] = losses.kl
    coefficient_C = torch.where(weights_C != 0, losses.coefficient * weights_C, 0.0)
    if not gradient:
        return logs, tile_CV, coefficient_C
    entropy_grad_C = torch.full_like(coefficient_C, -entropy_grad) if entropy_grad else None
    return logs, *logit_gradient_(tile_CV, targets_C, statistics, transform, coefficient_C, entropy_grad_C)
