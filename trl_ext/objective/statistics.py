"""Computes TRL's metrics of a micro-batch's loss from sums over each sequence's tokens.

Shapes: B sequences of a micro-batch, S statistics of a sequence, N live tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels.head.token_losses import SURROGATES
from trl_ext.compat import LossSettings

from .interface import LossResult

STATISTICS = ("tokens", "entropy", "kl", "low", "high")  # sums over a sequence's tokens
CLIPPED = tuple(name for name, surrogate in SURROGATES.items() if surrogate == "clip")


def sequence_statistics(
    output: Any, sequence_N: torch.Tensor, n_sequences: int, settings: LossSettings
) -> torch.Tensor:
    """Returns sums over each sequence's tokens, (B, S) float32, in the order of ``STATISTICS``.

    ``output`` has the fields of ``grpo_kernels.GRPOLoss``. ``low`` and ``high`` count tokens whose ratio is outside the
    clip range, on the side where clipping removes the gradient.
    """
    ratio, advantages = output.ratio, output.advantages
    if settings.delta is not None and settings.loss_type in CLIPPED:
        ratio = ratio.clamp(max=settings.delta)
    high_bound = settings.epsilon_high if settings.loss_type == "cispo" else 1 + settings.epsilon_high
    low = (ratio < 1 - settings.epsilon_low) & (advantages < 0)
    high = (ratio > high_bound) & (advantages > 0)
    kl = torch.zeros_like(ratio) if output.kl is None else output.kl
    columns = [torch.ones_like(ratio), output.entropies, kl, low, high]
    values_NS = torch.stack([column.float() for column in columns], dim=1)
    return values_NS.new_zeros(n_sequences, len(columns)).index_add_(0, sequence_N.to(values_NS.device), values_NS)


def micro_batch_metrics(table_BS: torch.Tensor, settings: LossSettings, *, entropy: bool = True) -> dict[str, float]:
    """Returns TRL's metrics of one micro-batch: means over tokens, and extremes over sequences.

    ``table_BS`` (B, S) holds the statistics of all ranks, on the CPU.
    """
    table = dict(zip(STATISTICS, table_BS.double().unbind(1), strict=True))

    def mean_over_tokens(name: str) -> float:
        return (table[name].sum() / table["tokens"].sum().clamp(min=1)).item()

    def over_sequences(name: str) -> torch.Tensor:
        share_B = table[name] / table["tokens"]
        share_B = share_B[~share_B.isnan()]  # drops sequences without tokens
        return share_B if len(share_B) else torch.tensor([torch.nan])

    metrics: dict[str, float] = {}
    if settings.beta != 0:
        metrics["kl"] = mean_over_tokens("kl")
    if entropy:
        metrics["entropy"] = mean_over_tokens("entropy")
    if settings.loss_type in CLIPPED:
        metrics["clip_ratio/low_mean"] = mean_over_tokens("low")
        metrics["clip_ratio/high_mean"] = mean_over_tokens("high")
        metrics["clip_ratio/region_mean"] = mean_over_tokens("low") + mean_over_tokens("high")
        metrics["clip_ratio/low_min"] = over_sequences("low").min().item()
        metrics["clip_ratio/high_max"] = over_sequences("high").max().item()
    elif settings.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean_over_tokens("high")
    return metrics


def trl_micro_batch_metrics(
    result: LossResult, settings: LossSettings, accelerator: Any, *, last: bool
) -> dict[str, float]:
    """Returns all metrics that TRL logs of one of its own micro-batches, with a single gather and device-to-host copy.

    ``last``: whether it is the last of an optimizer step in training; TRL then logs the entropy bonus's coefficient.
    """
    assert result.statistics_BS is not None and result.policy_loss is not None
    aux_loss = torch.zeros_like(result.policy_loss) if result.aux_loss is None else result.aux_loss
    scalars = torch.stack([x.to(result.statistics_BS) for x in (result.policy_loss, aux_loss)])
    repeated = scalars.expand(len(result.statistics_BS), 2)
    gathered = accelerator.gather(torch.cat([result.statistics_BS, repeated], dim=1)).cpu()
    metrics: dict[str, float] = {}
    if settings.entropy_bonus:
        metrics["policy_loss"] = gathered[:, -2].mean().item()
        if last:
            metrics["entropy_coef"] = settings.entropy_coef
    if settings.aux_loss:
        metrics["aux_loss"] = gathered[:, -1].mean().item()
    return metrics | micro_batch_metrics(gathered[:, :-2], settings)
