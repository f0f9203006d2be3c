"""Makes our columns of TRL's per-sequence dict (see ``schema.Sequences``), which TRL shuffles with its own."""

from __future__ import annotations

import torch

from grpo_kernels import Normalized
from trl_ext.schema import Batch

from .rewarded import RewardedBatch


def group_columns(batch: RewardedBatch, normalized: Normalized, n_local: int, process_index: int) -> Batch:
    """Returns the columns of this rank's ``n_local`` sequences. ``batch`` and ``normalized`` are of all ranks.

    Our column ``advantages`` replaces TRL's.
    """
    advantages_B = normalized.advantages.flatten()
    local = slice(process_index * n_local, (process_index + 1) * n_local)
    position_B = torch.arange(len(advantages_B), device=advantages_B.device)
    prompt_id_B = (position_B // batch.num_generations)[local]
    return {
        "advantages": advantages_B[local],
        "prompt_id": prompt_id_B,
        "group_position": (position_B % batch.num_generations)[local],
        "group_rewards": batch.rewards[prompt_id_B],
        "prompt_key": batch.keys_B[local],
        "function_rewards": batch.rewards_BF[local],
        "generated": batch.lengths_B[local],
    }
