"""What a logged step knows of each sequence beside its gradient: prompt, rewards, advantage, coefficient, features.

Shapes: B sequences of a micro-batch, of the step on this process, or of all processes; G completions of one prompt, F
reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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


def of_sequences(batch: dict[str, Any], first: int) -> dict[str, torch.Tensor]:
    """Of each sequence, by name as in ``Known``; prompt ids are counted from ``first``."""
    advantage_B = batch["advantages"]
    if advantage_B.dim() != 1:
        advantage_B = torch.full_like(advantage_B[:, 0], torch.nan)
    return {
        "prompt_id": batch["prompt_id"] + first,
        "prompt_key": batch["prompt_key"],
        "position": batch["group_position"],
        "length": batch["generated"],
        "advantage": advantage_B,
        "made_at": advantage_B.clone(),
        "weight": batch["token_weight"],
        "group_rewards": batch["group_rewards"],
        "function_rewards": batch["function_rewards"],
    }


WHOLE = ("prompt_id", "prompt_key", "position", "length", "square")
NUMBERS = ("advantage", "made_at", "weight", "group_rewards", "function_rewards", "coefficient")


def join_sequences(
    run: list[dict[str, torch.Tensor | None]], skipped: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor | None]:
    """One entry by name for all sequences of the step: those that ran, then those that didn't.

    None where a micro-batch has None. Sequences that didn't run have coefficient 0.
    """
    joined: dict[str, torch.Tensor | None] = {}
    for name in (*WHOLE[:-1], *NUMBERS):
        parts: list[Any] = [one[name] for one in run]
        if any(part is None for part in parts):
            joined[name] = None
            continue
        for one in skipped:
            parts.append(one[name] if name in one else parts[0].new_zeros(len(one["prompt_id"])))
        joined[name] = torch.cat(parts)
    return joined


@dataclass(frozen=True)
class Known:
    """Of the sequences of a step. ``prompt_id``, ``prompt_key``, ``position`` (in the group) and ``length`` (generated
    tokens): int64 (B,). ``square``: |u_i|^2, float64 (B,). ``advantage``, ``made_at`` (the one within the coefficient:
    1 where a sequence of advantage 0 was scored beside the step), ``weight`` (of a token in the loss) and
    ``coefficient`` (None: unknown), float32 (B,); ``group_rewards`` (B, G) of the whole group, ``function_rewards`` (B,
    F), NaN where unscorable."""

    prompt_id: torch.Tensor
    prompt_key: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    square: torch.Tensor
    advantage: torch.Tensor
    made_at: torch.Tensor
    weight: torch.Tensor
    group_rewards: torch.Tensor
    function_rewards: torch.Tensor
    coefficient: torch.Tensor | None

    def cpu(self) -> Known:
        """The same on the CPU."""
        return replace(self, **{name: value.cpu() for name, value in vars(self).items() if value is not None})

    @property
    def beside(self) -> torch.Tensor:
        """(B,) bool: scored beside the step, to whose gradient they contribute nothing."""
        return (self.made_at != self.advantage) & ~self.advantage.isnan()

    @property
    def reward(self) -> torch.Tensor:
        """(B,) weighted, NaN where unscorable."""
        return self.group_rewards.gather(1, self.position[:, None]).squeeze(1)


def pack_known(joined: dict[str, torch.Tensor | None], processes: int) -> torch.Tensor:
    """To be gathered at once: (B, N) int64, floats as their bits; coefficients are those of all ``processes``."""
    numbers: dict[str, Any] = {name: joined[name] for name in NUMBERS}
    unknown = numbers["coefficient"] is None
    numbers["coefficient"] = numbers["weight"] * torch.nan if unknown else numbers["coefficient"] / processes
    columns = [value.float().reshape(len(value), -1) for value in numbers.values()]
    whole: list[Any] = [joined[name] for name in WHOLE]
    whole[-1] = whole[-1].double().view(torch.int64)
    numbers_BN = torch.cat(columns, dim=1)
    numbers_BN = torch.nn.functional.pad(numbers_BN, (0, numbers_BN.shape[1] % 2)).contiguous()
    return torch.cat([torch.stack(whole, dim=1), numbers_BN.view(torch.int64)], dim=1)


def unpack_known(packed_BN: torch.Tensor, num_generations: int, n_functions: int) -> Known:
    """What ``pack_known`` packed."""
    whole = list(packed_BN[:, : len(WHOLE)].unbind(1))
    whole[-1] = whole[-1].contiguous().view(torch.float64)
    numbers_BN = packed_BN[:, len(WHOLE) :].contiguous().view(torch.float32)
    sizes = [1, 1, 1, num_generations, n_functions, 1]
    advantage, made_at, weight, group, function, coefficient = numbers_BN[:, : sum(sizes)].split(sizes, dim=1)
    return Known(
        **dict(zip(WHOLE, whole, strict=True)),
        advantage=advantage.squeeze(1),
        made_at=made_at.squeeze(1),
        weight=weight.squeeze(1),
        group_rewards=group,
        function_rewards=function,
        coefficient=None if coefficient.isnan().any() else coefficient.squeeze(1),
    )
