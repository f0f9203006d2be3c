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

from trl_ext.compat import LossSettings
from trl_ext.schema import Sequences


def token_weights(batch: Sequences, settings: LossSettings, *, training: bool) -> torch.Tensor:
    """Weights (B,) float32 as in the module's table, of one of TRL's micro-batches, or of an evaluation batch.

    From the mask as it is now, which a subclass may have changed. An evaluation batch is neither split nor accumulated:
    it has one step a generation.
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
