"""What the two ways to a micro-batch's loss have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trl_ext.compat import LossSettings
from trl_ext.schema import Sequences

Method = tuple[str, Mapping[str, Any]]  # a normalisation and its options


@dataclass(frozen=True)
class LossContext:
    """What a micro-batch's loss depends on beyond the model and the batch.

    ``weights_B`` (B,): of a token of each sequence (``token_weights.py``). ``accumulation``: micro-batches of this
    optimizer step, 1 in evaluation. ``method``: the run's normalisation where the kernel may evaluate it from the
    group's rewards, None where it is to take the batch's advantages. ``shared``: each prompt runs once.
    """

    settings: LossSettings
    weights_B: torch.Tensor
    accumulation: float
    method: Method | None = None
    shared: bool = False


@dataclass(frozen=True)
class LossResult:
    """``loss``, 0-d with its graph, divided by the accumulation as TRL's is. Detached, what is to be logged of it:
    ``statistics_BS`` (``statistics.py``), ``policy_loss`` as TRL logs it, ``aux_loss``; None where TRL has logged it.
    """

    loss: torch.Tensor
    statistics_BS: torch.Tensor | None = None
    policy_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class Objective(Protocol):
    """Makes a micro-batch's loss."""

    def why_not(self, settings: LossSettings, batch: Sequences) -> str | None:
        """Why it can't make this one, or None."""

    def loss(self, model: torch.nn.Module, batch: Sequences, context: LossContext) -> LossResult:
        """The loss, with its graph."""
