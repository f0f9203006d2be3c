"""What the gradient allows: may sequences change their micro-batch, may some be left out.

``what_runs`` decides from the options and the batch, and says why. Which columns may be cut: ``padding.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_ext.compat import LossSettings
from trl_ext.objective.fused import why_not_fused
from trl_ext.options import CurvatureOptions
from trl_ext.schema import Sequences

# where a subclass may compute with TRL's own micro-batches, or with what has gathered in .grad between two of them
OWN_METHODS = ("_compute_loss", "compute_loss", "_prepare_inputs", "training_step")


@dataclass(frozen=True)
class WhatRuns:
    """``regrouped``: sequences change micro-batches, ``skipped``: those without a gradient don't run; and why (not)."""

    regrouped: bool
    skipped: bool
    why: str


EVERYTHING = WhatRuns(False, False, "Every sequence runs.")


def why_not_regrouped(
    options: CurvatureOptions, settings: LossSettings, batch: Sequences, own: str | None
) -> str | None:
    """Why the gradient would depend on which sequences share a micro-batch, or None where it doesn't."""
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
    if own is not None:
        return own
    if batch.advantages.dim() != 1:
        return "single tokens have advantages of their own"
    return None


def what_runs(options: CurvatureOptions, settings: LossSettings, batch: Sequences, own: str | None) -> WhatRuns:
    """Of ``batch``, a micro-batch as TRL makes it, or a whole generation batch.

    ``own``: what to say of a method of ``OWN_METHODS`` that a subclass has, or None.
    """
    obstacle = why_not_regrouped(options, settings, batch, own)
    if obstacle is not None:
        return WhatRuns(False, False, f"Every sequence runs, in TRL's own micro-batches: {obstacle}.")
    regrouped = "Micro-batches are regrouped by length and trimmed"
    if settings.beta != 0:
        kl = f"{regrouped}; every sequence runs: beta={settings.beta:g}, and the KL penalty of any has a gradient."
        return WhatRuns(True, False, kl)
    return WhatRuns(True, True, f"{regrouped}; sequences of advantage 0 don't run.")


def has_gradient(batch: Sequences) -> torch.Tensor:
    """(B,) bool: sequences whose advantage isn't 0 and that have a token which the loss counts.

    The definition of a live sequence; a live group's is ``advantages/compute.py``'s ``live_groups``."""
    return (batch.advantages != 0) & (batch.live_tokens > 0)


def sequences_to_run(batch: Sequences, runs: WhatRuns) -> torch.Tensor:
    """(B,) bool: those that are to run."""
    return has_gradient(batch) if runs.skipped else torch.ones_like(batch.live_tokens, dtype=torch.bool)


def dead_sequences(batch: Sequences) -> list[Sequences]:
    """Those of advantage 0 that have a token that counts, as a batch; none where there is none, or tokens have
    advantages of their own."""
    if batch.advantages.dim() != 1:
        return []
    dead_B = ((batch.advantages == 0) & (batch.live_tokens > 0)).nonzero().squeeze(1)
    return [batch.select(dead_B)] if len(dead_B) else []
