"""4-bit layers stay trainable on every CPU."""

from __future__ import annotations

import torch


def keep_trainable(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking the weights of 4-bit layers.

    On CPUs with bf16 instructions it does so for good at the first forward in eval mode (generation), and its product
    with a repacked weight has no gradient: nothing would be trained, silently.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
