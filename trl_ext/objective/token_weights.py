"""Computes the weight of one token of each sequence in its micro-batch's loss.

All of TRL's loss types aggregate tokens as ``loss = sum_i w_i sum_t loss_it / accumulation``; they differ in w_i. B is
the number of sequences of the micro-batch, len_i the live tokens of sequence i, max_len ``max_completion_length``::

    grpo, sapo            1 / (B len_i)
    bnpo                  1 / (live tokens of the micro-batch)
    dr_grpo               1 / (B max_len)
    luspo                 1 / B
    dapo, cispo, vespo    processes * steps_per_generation / (live tokens of the generation batch)

The weights don't include the division by the accumulation steps, because their number is known only when the loss is
computed: the last step of an epoch may have fewer.
"""

from __future__ import annotations

import torch

from trl_ext.compat import LossSettings
from trl_ext.schema import Sequences


def token_weights(batch: Sequences, settings: LossSettings, *, training: bool) -> torch.Tensor:
    """Returns the weights (B,) float32 of one of TRL's micro-batches, or of an evaluation batch, by the module's table.

    They are computed from the batch's current mask, which a subclass may have changed. An evaluation batch is neither
    split nor accumulated, so it has one step per generation.
    """
    lengths_B = batch.live_tokens.float()
    ones_B = torch.ones_like(lengths_B)
    if settings.loss_type in ("grpo", "sapo"):
        return 1 / (len(lengths_B) * lengths_B.clamp(min=1))
    if settings.loss_type == "dr_grpo":
        return ones_B / (len(lengths_B) * settings.max_completion_length)
    if settings.loss_type == "luspo":
        return ones_B / len(lengths_B)
    if settings.loss_type in ("dapo", "cispo", "vespo"):
        steps = settings.steps_per_generation if training else 1
        return ones_B * (settings.num_processes * steps) / batch.num_items.clamp(min=1)
    return ones_B / lengths_B.sum().clamp(min=1)  # bnpo
