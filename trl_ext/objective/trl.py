"""Falls back to TRL's own loss, for losses that aren't a sum over single tokens."""

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
    """Computes the loss by ``compute``, TRL's ``GRPOTrainer._compute_loss``, which also logs its metrics.

    TRL takes log-probs from the model's head, which is ours if ``fused_loss`` is on.
    """

    compute: Callable[[Any, Batch], torch.Tensor]

    def why_not(self, settings: LossSettings, batch: Sequences) -> str | None:
        """Returns None: it can compute every loss."""
        return None

    def loss(self, model: torch.nn.Module, batch: Sequences, context: LossContext) -> LossResult:
        """Returns TRL's loss. TRL reads options and accumulation from the trainer, not from ``context``."""
        return LossResult(self.compute(model, batch.columns))
