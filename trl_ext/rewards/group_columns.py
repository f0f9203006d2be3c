"""What later stages need of each sequence, added to TRL's per-sequence dict before TRL shuffles it.

``prompt_id`` (B,) int64, the group's number in the generation batch, the same on every process; ``group_position`` (B,)
int64, in [0, G); ``prompt_key`` (B,) int64, the same whenever the prompt comes back; ``group_rewards`` (B, G), the
weighted rewards of the sequence's whole group, NaN where unscorable; ``function_rewards`` (B, F), its own by function;
``generated`` (B,) int64, its tokens; ``advantages`` (B,), in place of TRL's, and ``made_advantages``, a copy, by which
a subclass's own are noticed. B: the sequences of one process.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels import Normalized

from .rewarded import RewardedBatch


def add_group_columns(
    output: dict[str, Any], batch: RewardedBatch, normalized: Normalized, *, process_index: int
) -> None:
    """``batch`` and ``normalized`` are of all processes; ``output`` is this process's dict."""
    advantages_B = normalized.advantages.flatten()
    n_local = len(output["prompt_ids"])
    local = slice(process_index * n_local, (process_index + 1) * n_local)
    position_B = torch.arange(len(advantages_B), device=advantages_B.device)
    output["advantages"] = advantages_B[local]
    output["made_advantages"] = advantages_B[local].clone()
    output["prompt_id"] = (position_B // batch.num_generations)[local]
    output["group_position"] = (position_B % batch.num_generations)[local]
    output["group_rewards"] = batch.rewards[output["prompt_id"]]
    output["prompt_key"] = batch.keys_B[local]
    output["function_rewards"] = batch.rewards_BF[local]
    output["generated"] = batch.lengths_B[local]
