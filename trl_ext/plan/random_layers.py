"""What of a model draws random numbers in training, which regrouping gives to other tokens."""

from __future__ import annotations

import torch

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
