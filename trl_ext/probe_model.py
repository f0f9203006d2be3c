"""Finds properties of a model from its configuration, or by a forward pass of a few tokens that leaves it unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from grpo_kernels.backend import rounds_products
from grpo_kernels.interference.layer_taps import full_shape

T = TypeVar("T")


def is_sharded(accelerator: Accelerator) -> bool:
    """Returns whether the engine shards the parameters over ranks: FSDP, and DeepSpeed's ZeRO-3."""
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
    return zero3 or accelerator.distributed_type == DistributedType.FSDP


def has_engine(accelerator: Accelerator) -> bool:
    """Returns whether FSDP or DeepSpeed runs the model, and holds its parameters or gradients."""
    return is_sharded(accelerator) or accelerator.distributed_type == DistributedType.DEEPSPEED


def is_loaded(model: torch.nn.Module) -> bool:
    """Returns whether the model's parameters are loaded, not on the meta device."""
    return not any(parameter.is_meta for parameter in model.parameters())


def probe_ids(model: Any, rows: int, tokens: int) -> torch.Tensor:
    """Returns made-up token ids, (rows, tokens)."""
    weight = model.get_input_embeddings().weight
    return (torch.arange(rows * tokens, device=weight.device) * 7 % full_shape(weight)[0]).view(rows, tokens)


def detect_half_products(model: torch.nn.Module, run: Callable[[], T]) -> tuple[T, bool]:
    """Runs ``run``. Returns its result, and whether a linear layer multiplied in half precision.

    That depends on the layers' dtypes, on autocast (accelerate's or the user's), on quantization and on TF32.
    """
    half: list[bool] = []

    def record(module: torch.nn.Module, args: Any, output: Any) -> None:
        weight = next(module.parameters(recurse=False), None)
        if isinstance(output, torch.Tensor) and weight is not None:
            half.append(not weight.is_floating_point() or rounds_products(output.device, output.dtype, weight.dtype))

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_hook(record) for module in linear]
    try:
        return run(), any(half)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model into eval mode in this context, and restores each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def why_rows_mix(model: Any) -> str | None:
    """Returns why a sequence's output depends on the other sequences of its micro-batch, or None if it doesn't."""
    kinds = {getattr(adapter, "peft_type", None) for adapter in getattr(model, "peft_config", {}).values()}
    return "Lily's router averages over all tokens that run together" if "LILY" in kinds else None
