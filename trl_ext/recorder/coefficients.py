"""Computes the coefficient of a sequence's score in the gradient of the loss.

Shapes: B sequences of a micro-batch.
"""

from __future__ import annotations

import torch

from trl_ext.compat import LossSettings
from trl_ext.schema import Sequences


def sequence_coefficients(batch: Sequences, settings: LossSettings, accumulation: int) -> torch.Tensor | None:
    """Returns (B,) c_i with u_i = c_i grad log pi(o_i | q_p), u_i the sequence's part of this rank's gradient.

    On policy every ratio is 1, so c = -A w / accumulation for all of TRL's losses except VESPO (cispo clamps the ratio
    at ``epsilon_high``, not at 1 + ``epsilon_high``). None if the tokens of a sequence have different coefficients:
    off policy, vLLM's correction, KL, an entropy bonus or mask, an auxiliary loss, advantages of single tokens.
    """
    if (
        batch.old_logprobs is not None
        or settings.importance_correction
        or settings.beta != 0
        or settings.entropy_bonus
        or settings.aux_loss
        or settings.top_entropy_quantile < 1.0
        or settings.off_policy_mask_threshold is not None
        or settings.loss_type == "vespo"
        or batch.advantages.dim() != 1
    ):
        return None
    clamp = min(1.0, settings.epsilon_high) if settings.loss_type == "cispo" else 1.0
    has_tokens_B = batch.live_mask.any(dim=1)
    return torch.where(has_tokens_B, -batch.advantages * batch.token_weight * (clamp / accumulation), 0.0)
