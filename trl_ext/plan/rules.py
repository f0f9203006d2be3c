"""Decides whether sequences may change their micro-batch, and whether some may be skipped, with the same gradient.

``decide_regrouping`` decides by the options and the batch, and gives the reason. ``padding.py`` decides about padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_ext.compat import LossSettings
from trl_ext.objective.fused import why_not_fused
from trl_ext.options import CurvatureOptions
from trl_ext.schema import Sequences

# methods in which a subclass may use TRL's own micro-batches, or the .grad that has accumulated between two of them
OWN_METHODS = ("_compute_loss", "compute_loss", "_prepare_inputs", "training_step")


@dataclass(frozen=True)
class Regrouping:
    """What happens to TRL's micro-batches.

    Attributes:
        regrouped: whether sequences go into other micro-batches.
        skipped: whether sequences without a gradient are skipped.
        why: the reason, to be logged.
    """

    regrouped: bool
    skipped: bool
    why: str


RUN_ALL = Regrouping(False, False, "Every sequence runs.")


def why_not_regrouped(
    options: CurvatureOptions, settings: LossSettings, batch: Sequences, override: str | None
) -> str | None:
    """Returns why the gradient depends on which sequences share a micro-batch, or None if it doesn't."""
    if not options.skip_zero_advantage:
        return "skip_zero_advantage=False"
    if not options.fused_loss:
        return "fused_loss=False, and TRL's own loss averages over a micro-batch"
    obstacle = why_not_fused(settings, batch)
    if obstacle is not None:
        return f"{obstacle}, and TRL's own loss averages over a micro-batch"
    if settings.aux_loss:
        return "the auxiliary loss of a mixture of experts depends on which sequences share a micro-batch"
    if settings.entropy_bonus:
        return "the entropy bonus averages over a micro-batch"
    if override is not None:
        return override
    if batch.advantages.dim() != 1:
        return "tokens of a sequence have different advantages"
    return None


def decide_regrouping(
    options: CurvatureOptions, settings: LossSettings, batch: Sequences, override: str | None
) -> Regrouping:
    """Decides what happens to the sequences of ``batch``, one of TRL's micro-batches or a generation batch.

    ``override``: the reason to log if a subclass overrides a method of ``OWN_METHODS``; None if it doesn't.
    """
    obstacle = why_not_regrouped(options, settings, batch, override)
    if obstacle is not None:
        return Regrouping(False, False, f"Every sequence runs, in TRL's own micro-batches: {obstacle}.")
    regrouped = "Micro-batches are regrouped by length and trimmed"
    if settings.beta != 0:
        kl = f"{regrouped}; every sequence runs: beta={settings.beta:g}, and the KL penalty of any has a gradient."
        return Regrouping(True, False, kl)
    return Regrouping(True, True, f"{regrouped}; sequences of advantage 0 don't run.")


def has_gradient(batch: Sequences) -> torch.Tensor:
    """Returns (B,) bool: True where the advantage isn't 0 and the sequence has a token that the loss counts.

    This is the definition of a live sequence. ``live_groups`` (``advantages/compute.py``) defines a live group.
    """
    return (batch.advantages != 0) & (batch.live_tokens > 0)


def sequences_to_run(batch: Sequences, runs: Regrouping) -> torch.Tensor:
    """Returns (B,) bool: the sequences that run."""
    return has_gradient(batch) if runs.skipped else torch.ones_like(batch.live_tokens, dtype=torch.bool)


def dead_sequences(batch: Sequences) -> list[Sequences]:
    """Returns a list with one batch: the sequences of advantage 0 that have a token in the loss.

    The list is empty if there are none, or if single tokens have advantages.
    """
    if batch.advantages.dim() != 1:
        return []
    dead_B = ((batch.advantages == 0) & (batch.live_tokens > 0)).nonzero().squeeze(1)
    return [batch.select(dead_B)] if len(dead_B) else []
