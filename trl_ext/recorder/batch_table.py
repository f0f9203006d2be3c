"""Makes the ``SequenceTable`` of a micro-batch from TRL's per-sequence dict."""

from __future__ import annotations

import torch

from grpo_kernels.recorder.sequence_table import SequenceTable
from trl_ext.schema import Sequences


def table_of_batch(batch: Sequences, first_prompt: int, coefficient_B: torch.Tensor | None) -> SequenceTable:
    """Makes the table of a batch, whose prompt ids are counted from ``first_prompt``."""
    advantage_B = batch.advantages
    if advantage_B.dim() != 1:
        advantage_B = torch.full_like(advantage_B[:, 0], torch.nan)
    return SequenceTable(
        prompt_id=batch.prompt_id + first_prompt,
        prompt_key=batch.prompt_key,
        position=batch.group_position,
        length=batch.generated,
        advantage=advantage_B,
        score_advantage=advantage_B,
        weight=batch.token_weight,
        group_rewards=batch.group_rewards,
        function_rewards=batch.function_rewards,
        square=torch.zeros_like(advantage_B, dtype=torch.float64),
        coefficient=coefficient_B,
    )


def table_of_skipped(batch: Sequences, first_prompt: int) -> SequenceTable:
    """Makes the table of sequences that don't run: their coefficient is 0."""
    return table_of_batch(batch, first_prompt, torch.zeros_like(batch.token_weight))
