"""Computes the loss of a micro-batch: chooses the objective and logs the statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .compat import LossSettings, RunSettings
from .objective.fused import FusedObjective
from .objective.interface import LossContext, Objective
from .objective.statistics import trl_micro_batch_metrics
from .objective.token_weights import token_weights
from .objective.trl import TRLObjective
from .plan.micro_batch import micro_batch
from .plan.micro_batches import MicroBatches
from .schema import Batch, Sequences


class LossStep:
    """Computes the losses for ``GRPOTrainer._compute_loss``."""

    def __init__(self, run: RunSettings, micro_batches: MicroBatches) -> None:
        self.run, self.micro_batches = run, micro_batches
        self.fused = FusedObjective(run.accelerator.autocast)

    def loss(
        self, model: Any, inputs: Batch, settings: LossSettings, compute: Callable[..., Any], accumulation: float | None
    ) -> torch.Tensor:
        """Returns the micro-batch's loss (0-d, with its graph), and logs its statistics.

        Args:
            compute: TRL's own ``_compute_loss``, the fallback.
            accumulation: number of micro-batches of this optimizer step; None in evaluation.
        """
        batch, part = Sequences(inputs), micro_batch(inputs)
        objective: Objective
        for objective in (self.fused, TRLObjective(compute)):
            obstacle = objective.why_not(settings, batch)
            if obstacle is None:
                break
            self.run.log_once(f"The loss isn't made in one pass, but by TRL on our head's log-probs: {obstacle}.")
        # regrouped sequences keep the token weights that they have in TRL's own micro-batches
        training = accumulation is not None
        weights_B = token_weights(batch, settings, training=training) if part.is_trls else batch.token_weight
        context = LossContext(settings, weights_B, accumulation or 1.0, part.method, part.packed > 0)
        result = objective.loss(model, batch, context)
        last = training and self.run.accelerator.sync_gradients
        if result.statistics_BS is not None and part.is_trls:
            self.run.log(trl_micro_batch_metrics(result, settings, self.run.accelerator, last=last))
        elif result.statistics_BS is not None:
            self.micro_batches.record(part, result.statistics_BS)
        return result.loss
