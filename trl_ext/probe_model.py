"""What a model is like: by its configuration, or by a few tokens through it, which change nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from grpo_kernels.backend import rounds_products
from grpo_kernels.interference.layer_taps import whole_shape

T = TypeVar("T")


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


def multiplies_in_half(model: torch.nn.Module, run: Callable[[], T]) -> tuple[T, bool]:
    """What ``run`` returns, and whether a layer's products in it had half precision's digits: by the layer's dtypes,
    autocast's (accelerate's or the user's), a quantized base's, or TF32's."""
    half: list[bool] = []

    def look(module: torch.nn.Module, args: Any, output: Any) -> None:
        weight = next(module.parameters(recurse=False), None)
        if isinstance(output, torch.Tensor) and weight is not None:
            half.append(not weight.is_floating_point() or rounds_products(output.device, output.dtype, weight.dtype))

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_hook(look) for module in linear]
    try:
        return run(), any(half)
    finally:
        for handle in handles:
            handle.remove()


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


def mixes_rows(model: Any) -> str | None:
    """What of the model's adapters makes a sequence's result depend on the others of its micro-batch, or None."""
    kinds = {getattr(adapter, "peft_type", None) for adapter in getattr(model, "peft_config", {}).values()}
    return "Lily's router averages over all tokens that run together" if "LILY" in kinds else None
