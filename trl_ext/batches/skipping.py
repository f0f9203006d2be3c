"""What the gradient allows: may sequences change their micro-batch, may some be left out.

``what_runs`` decides from the options and the batch, and says why. Which columns may be cut: ``columns.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.config import Options
from trl_ext.loss.fused_loss import why_not_one_pass
from trl_ext.loss.token_weights import live_tokens
from trl_ext.trl_surface import LossSettings

# where a subclass may compute with TRL's own micro-batches, or with what has gathered in .grad between two of them
OWN_METHODS = ("_compute_loss", "compute_loss", "_prepare_inputs", "training_step")


@dataclass(frozen=True)
class WhatRuns:
    """``regrouped``: sequences change micro-batches, ``skipped``: those without a gradient don't run; and why (not)."""

    regrouped: bool
    skipped: bool
    why: str


EVERYTHING = WhatRuns(False, False, "Every sequence runs.")


def why_not_regrouped(options: Options, settings: LossSettings, batch: dict[str, Any], own: str | None) -> str | None:
    """Why the gradient would depend on which sequences share a micro-batch, or None where it doesn't."""
    if not options.skip_zero_advantage:
        return "skip_zero_advantage=False"
    if not options.fused_loss:
        return "fused_loss=False, and TRL's own loss averages over a micro-batch"
    obstacle = why_not_one_pass(settings, batch)
    if obstacle is not None:
        return f"{obstacle}, and TRL's own loss averages over a micro-batch"
    if settings.aux_loss:
        return "the auxiliary loss of a mixture of experts depends on which sequences share a micro-batch"
    if settings.entropy_bonus:
        return "the entropy bonus averages over a micro-batch"
    if own is not None:
        return own
    if batch["advantages"].dim() != 1:
        return "single tokens have advantages of their own"
    return None


def what_runs(options: Options, settings: LossSettings, batch: dict[str, Any], own: str | None) -> WhatRuns:
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


def live_sequences(batch: dict[str, Any], runs: WhatRuns) -> torch.Tensor:
    """(B,) bool: those that are to run."""
    tokens_B = live_tokens(batch)
    if not runs.skipped:
        return torch.ones_like(tokens_B, dtype=torch.bool)
    return (batch["advantages"] != 0) & (tokens_B > 0)


RANDOM = ("drop", "jitter", "noise")  # in the names of rates that a module keeps for its forward
BY_ROW_LENGTH = "neftune_noise_alpha"  # of an embedding, while transformers' NEFTune is active


def noise_by_row_length(model: torch.nn.Module) -> bool:
    """Whether the size of a random number depends on how long its row is, padding included."""
    return any(getattr(module, BY_ROW_LENGTH, None) for module in model.modules())


def random_layers(model: torch.nn.Module) -> str | None:
    """What of the model draws random numbers in training, or None: dropout modules (LoRA's among them), rates that a
    module keeps for its forward (dropout, stochastic depth, a router's jitter), and PVeRA's noise."""
    if any(getattr(adapter, "peft_type", None) == "PVERA" for adapter in getattr(model, "peft_config", {}).values()):
        return "PVeRA"
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return "dropout"
        for name, value in vars(module).items():
            rates = value.values() if isinstance(value, dict) else [value]  # PEFT keeps one for each adapter
            named = any(word in name for word in RANDOM) and name != BY_ROW_LENGTH
            if named and any(isinstance(rate, float) and rate > 0 for rate in rates):
                return name
    return None
