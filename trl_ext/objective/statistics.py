"""What TRL logs of a micro-batch's loss, from sums over each sequence's tokens.

Shapes: B sequences of a micro-batch, S statistics of a sequence, N live tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels.head.token_losses import SURROGATES
from trl_ext.compat import LossSettings

from .interface import LossResult

STATISTICS = ("tokens", "entropy", "kl", "low", "high")  # of a sequence: sums over its tokens
CLIPPED = tuple(name for name, surrogate in SURROGATES.items() if surrogate == "clip")


def sequence_statistics(
    output: Any, sequence_N: torch.Tensor, n_sequences: int, settings: LossSettings
) -> torch.Tensor:
    """Sums over each sequence's tokens, (B, S) float32, in the order of ``STATISTICS``.

    ``output`` has the fields of ``grpo_kernels.GRPOLoss``. ``low`` and ``high`` count tokens whose ratio left the clip
    range on the side where that stops the gradient.
    """
    ratio, advantages = output.ratio, output.advantages
    if settings.delta is not None and settings.loss_type in CLIPPED:
        ratio = ratio.clamp(max=settings.delta)
    high_bound = settings.epsilon_high if settings.loss_type == "cispo" else 1 + settings.epsilon_high
    low = (ratio < 1 - settings.epsilon_low) & (advantages < 0)
    high = (ratio > high_bound) & (advantages > 0)
    kl = torch.zeros_like(ratio) if output.kl is None else output.kl
    of_tokens = [torch.ones_like(ratio), output.entropies, kl, low, high]
    values_NS = torch.stack([value.float() for value in of_tokens], dim=1)
    return values_NS.new_zeros(n_sequences, len(of_tokens)).index_add_(0, sequence_N.to(values_NS.device), values_NS)


def micro_batch_metrics(table_BS: torch.Tensor, settings: LossSettings, *, entropy: bool = True) -> dict[str, float]:
    """TRL's means over tokens, and extremes over sequences, of one micro-batch of all processes: (B, S), on the CPU."""
    table = dict(zip(STATISTICS, table_BS.double().unbind(1), strict=True))

    def mean_over_tokens(name: str) -> float:
        return (table[name].sum() / table["tokens"].sum().clamp(min=1)).item()

    def over_sequences(name: str) -> torch.Tensor:
        share_B = table[name] / table["tokens"]
        share_B = share_B[~share_B.isnan()]  # a sequence without tokens
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
    one: LossResult, settings: LossSettings, accelerator: Any, *, last: bool
) -> dict[str, float]:
    """All that TRL logs of the loss of one of its own micro-batches, in one gather and one wait for the device.

    ``last``: of an optimizer step in training, when TRL logs the entropy bonus's coefficient.
    """
    assert one.statistics_BS is not None and one.policy_loss is not None
    aux_loss = torch.zeros_like(one.policy_loss) if one.aux_loss is None else one.aux_loss
    scalars = torch.stack([x.to(one.statistics_BS) for x in (one.policy_loss, aux_loss)])
    of_process = scalars.expand(len(one.statistics_BS), 2)
    gathered = accelerator.gather(torch.cat([one.statistics_BS, of_process], dim=1)).cpu()
    metrics: dict[str, float] = {}
    if settings.entropy_bonus:
        metrics["policy_loss"] = gathered[:, -2].mean().item()
        if last:
            metrics["entropy_coef"] = settings.entropy_coef
    if settings.aux_loss:
        metrics["aux_loss"] = gathered[:, -1].mean().item()
    return metrics | micro_batch_metrics(gathered[:, :-2], settings)
