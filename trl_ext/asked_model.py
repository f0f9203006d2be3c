"""Asking a model about itself: a few tokens through it before it is trained, of which training notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from grpo_kernels.interference.layer_taps import whole_shape


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the engine has, or will have, the parameters on several processes: FSDP, and DeepSpeed's ZeRO-3."""
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
    return zero3 or accelerator.distributed_type == DistributedType.FSDP


def can_be_asked(model: torch.nn.Module, accelerator: Accelerator, *, prepared: bool = False) -> bool:
    """Whether the model runs: its parameters are loaded; and by itself, or its engine has it (``prepared``), whose
    hooks gather them, on every process at once."""
    loaded = not any(parameter.is_meta for parameter in model.parameters())
    return loaded and (prepared or not is_sharded(accelerator))


def some_ids(model: Any, rows: int, tokens: int) -> torch.Tensor:
    """(rows, tokens) of made-up tokens."""
    weight = model.get_input_embeddings().weight
    return (torch.arange(rows * tokens, device=weight.device) * 7 % whole_shape(weight)[0]).view(rows, tokens)


def rounds_float32() -> bool:
    """Whether a GPU multiplies float32 in TF32, whose 10 bits of mantissa are half precision's."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """``model.eval()``, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
