"""TRL's own loss, for what isn't a sum over single tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.compat import LossSettings
from trl_ext.schema import Batch, Sequences

from .interface import LossContext, LossResult


@dataclass(frozen=True)
class TRLObjective:
    """``compute``: ``GRPOTrainer._compute_loss``, which logs what it computes.

    Its log-probs come from the model's head, which is ours where ``fused_loss`` is on.
    """

    compute: Callable[[Any, Batch], torch.Tensor]

    def why_not(self, settings: LossSettings, batch: Sequences) -> str | None:
        """It can make every loss."""
        return None

    def loss(self, model: torch.nn.Module, batch: Sequences, context: LossContext) -> LossResult:
        """TRL's loss; it reads the options and the accumulation from the trainer."""
        return LossResult(self.compute(model, batch.columns))
