"""The weight of one token of each sequence in its micro-batch's loss.

Every aggregation TRL offers is ``loss = sum_i w_i sum_t loss_it / accumulation``: only the weight differs. B is the
sequences of the micro-batch, len_i the live tokens of sequence i, max_len ``max_completion_length``::

    grpo, sapo            1 / (B len_i)
    bnpo                  1 / (live tokens of the micro-batch)
    dr_grpo               1 / (B max_len)
    luspo                 1 / B
    dapo, cispo, vespo    processes * steps_per_generation / (live tokens of the generation batch)

The division by the accumulation steps is left out: TRL knows it only when it computes the loss (the last step of an
epoch may have fewer).
"""

from __future__ import annotations

import torch


def live_tokens(sequences: dict[str, torch.Tensor]) -> torch.Tensor:
    """Completion tokens of each sequence that the loss counts (no padding, no tool output), (B,) int64."""
    mask_BT = sequences["completion_mask"]
    if "tool_mask" in sequences:
        mask_BT = mask_BT * sequences["tool_mask"]
    return mask_BT.sum(dim=1)


def token_weights(
    lengths_B: torch.Tensor,
    loss_type: str,
    *,
    micro_batch_size: int,
    max_completion_length: int,
    num_items_in_batch: torch.Tensor,
    num_processes: int,
    steps_per_generation: int,
) -> torch.Tensor | None:
    """Weights (B,) float32 as in the module's table, or None for ``bnpo``, whose weight needs the micro-batch.

    ``steps_per_generation`` is 1 in evaluation, where a batch is neither split nor accumulated.
    """
    lengths_B = lengths_B.float()
    ones_B = torch.ones_like(lengths_B)
    if loss_type in ("grpo", "sapo"):
        return 1 / (micro_batch_size * lengths_B.clamp(min=1))
    if loss_type == "dr_grpo":
        return ones_B / (micro_batch_size * max_completion_length)
    if loss_type == "luspo":
        return ones_B / micro_batch_size
    if loss_type in ("dapo", "cispo", "vespo"):
        return ones_B * (num_processes * steps_per_generation) / num_items_in_batch.clamp(min=1)
    return None


def micro_batch_token_weights(lengths_B: torch.Tensor) -> torch.Tensor:
    """``bnpo``: one over the live tokens of this micro-batch, (B,) float32."""
    return torch.ones_like(lengths_B, dtype=torch.float32) / lengths_B.sum().clamp(min=1)
