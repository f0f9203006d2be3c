"""What a logged step knows of each sequence beside its gradient: prompt, reward, coefficient, features.

Shapes: B sequences of a micro-batch, or of the step on this process.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.loss.token_weights import live_mask
from trl_ext.trl_surface import LossSettings


def sequence_coefficients(batch: dict[str, Any], settings: LossSettings, accumulation: int) -> torch.Tensor | None:
    """(B,) c_i with u_i = c_i grad log pi(o_i | q_p), u_i the sequence's part of the loss's gradient on this process.

    None where a sequence's tokens don't share one: off policy, vLLM's correction, KL, an entropy bonus or mask, an
    auxiliary loss. On policy every ratio is 1: c = -A w / accumulation for all of TRL's losses but VESPO; cispo clamps
    the ratio at ``epsilon_high`` itself.
    """
    if (
        batch.get("old_per_token_logps") is not None
        or settings.importance_correction
        or settings.beta != 0
        or settings.entropy_bonus
        or settings.aux_loss
        or settings.top_entropy_quantile < 1.0
        or settings.off_policy_mask_threshold is not None
        or settings.loss_type == "vespo"
        or batch["advantages"].dim() != 1
    ):
        return None
    clamp = min(1.0, settings.epsilon_high) if settings.loss_type == "cispo" else 1.0
    alive_B = live_mask(batch).any(dim=1)
    return torch.where(alive_B, -batch["advantages"] * batch["token_weight"] * (clamp / accumulation), 0.0)


def ids_and_rewards(batch: dict[str, Any], first: int) -> dict[str, torch.Tensor]:
    """``prompt_id`` (counted from ``first``), ``prompt_key`` and ``reward`` of each sequence, all (B,)."""
    reward_B1 = batch["group_rewards"].gather(1, batch["group_position"][:, None])
    return {
        "prompt_id": batch["prompt_id"] + first,
        "prompt_key": batch["prompt_key"],
        "reward": reward_B1.squeeze(1),
    }


def join_sequences(
    run: list[dict[str, torch.Tensor | None]], skipped: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor | None]:
    """One entry by name for all sequences of the step: those that ran, then those that didn't.

    None where a micro-batch has None. Sequences that didn't run have coefficient 0 and NaN features.
    """
    joined: dict[str, torch.Tensor | None] = {}
    for name in ("prompt_id", "prompt_key", "reward", "coefficient", "feature"):
        parts: list[Any] = [one[name] for one in run]
        if any(part is None for part in parts):
            joined[name] = None
            continue
        for one in skipped:
            unknown = 0.0 if name == "coefficient" else torch.nan
            count = len(one["reward"])
            parts.append(one[name] if name in one else parts[0].new_full((count, *parts[0].shape[1:]), unknown))
        joined[name] = torch.cat(parts)
    return joined
