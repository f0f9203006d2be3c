"""Asking a model about itself: a few tokens through it before it is trained, of which training notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


def can_be_asked(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether the model runs by itself: its parameters are loaded, and not on several processes."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return not sharded and not any(parameter.is_meta for parameter in model.parameters())


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
