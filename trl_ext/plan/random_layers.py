"""Finds layers that draw random numbers in training, which regrouping assigns to other tokens."""

from __future__ import annotations

import torch

RANDOM = ("drop", "jitter", "noise")  # parts of the names of rates that modules keep as attributes
BY_ROW_LENGTH = "neftune_noise_alpha"  # attribute of an embedding while transformers' NEFTune is active


def noise_by_row_length(model: torch.nn.Module) -> bool:
    """Returns whether the size of the noise depends on the length of a row, padding included (NEFTune)."""
    return any(getattr(module, BY_ROW_LENGTH, None) for module in model.modules())


def random_layers(model: torch.nn.Module) -> str | None:
    """Returns what draws random numbers in training, or None.

    It finds dropout modules (also LoRA's), rates that a module keeps as an attribute (dropout, stochastic depth, a
    router's jitter), and PVeRA's noise.
    """
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
