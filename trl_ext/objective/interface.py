"""Defines the interface of the two objectives, which compute a micro-batch's loss."""

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
    """What a micro-batch's loss depends on, in addition to the model and the batch.

    Attributes:
        weights_B: (B,), the weight of one token of each sequence (``token_weights.py``).
        accumulation: number of micro-batches of this optimizer step; 1 in evaluation.
        method: the run's normalisation, if the kernel may compute it from the group's rewards; None: the kernel takes
            the batch's advantages.
        shared: whether each prompt runs once.
    """

    settings: LossSettings
    weights_B: torch.Tensor
    accumulation: float
    method: Method | None = None
    shared: bool = False


@dataclass(frozen=True)
class LossResult:
    """The loss, and detached values to log; these are None if TRL has already logged them.

    Attributes:
        loss: 0-d with its graph, divided by the accumulation as in TRL.
        statistics_BS: (B, S), see ``statistics.py``.
        policy_loss: 0-d, as TRL logs it.
        aux_loss: 0-d, the load-balancing loss; None if there is none.
    """

    loss: torch.Tensor
    statistics_BS: torch.Tensor | None = None
    policy_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class Objective(Protocol):
    """Computes a micro-batch's loss."""

    def why_not(self, settings: LossSettings, batch: Sequences) -> str | None:
        """Returns why it can't compute this loss, or None if it can."""

    def loss(self, model: torch.nn.Module, batch: Sequences, context: LossContext) -> LossResult:
        """Returns the loss with its graph, and what to log."""
