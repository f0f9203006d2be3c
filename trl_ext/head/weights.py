"""Gathers the LM head's full weight, bias and LoRA factors from the shards of FSDP2 or ZeRO-3."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor, Partial

from grpo_kernels.interference.layer_taps import active_module


@contextmanager
def gathered_head(head: torch.nn.Module, hidden_NH: torch.Tensor, *, keep: bool):
    """Yields the head's full weight, bias and low-rank adapter, gathered from FSDP2's or ZeRO-3's shards.

    ``keep``: whether backward needs the weight. ZeRO-3 has released it by then, so ``keep`` makes a copy.
    """
    low_rank, head = None, active_module(head)
    if isinstance(head, BaseTunerLayer):
        low_rank = head_adapter(head, hidden_NH)
        head = cast(torch.nn.Module, head.get_base_layer())
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    weight, bias = _unsharded(weight), _unsharded(bias)
    with gathered_by_zero3(weight, bias):
        if hasattr(weight, "ds_id") and keep and torch.is_grad_enabled():
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        yield weight, bias, low_rank


def gathered_by_zero3(*parameters: Any) -> AbstractContextManager[Any]:
    """Returns the context in which ZeRO-3 has gathered these parameters; None among them is left out.

    A parameter that is already whole (a tied embedding's, in a forward) isn't gathered: on exit ZeRO-3 would release it
    under the layer that still uses it.
    """
    sharded = {id(one): one for one in parameters if hasattr(one, "ds_status") and one.ds_status.name != "AVAILABLE"}
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(sharded.values()))


def _unsharded(parameter: Any) -> Any:
    """Gathers a parameter from FSDP2's shards; its gradient is the mean over ranks, as FSDP2's own gradients are.

    ``full_tensor()`` alone would assume that all ranks have the same gradient, and keep one rank's for each shard.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def head_adapter(head: BaseTunerLayer, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the active LoRA adapters on the LM head as two factors: scaled ``A(hidden)`` (N, R) and ``B`` (V, R).

    Returns None if adapters are disabled or merged. Raises ``ValueError`` for adapters that aren't plain LoRA.
    """
    if head.disable_adapters or head.merged:
        return None
    inputs, matrices = [], []
    for name in head.active_adapters:
        if not isinstance(head, LoraLayer) or name in getattr(head, "lora_variant", {}):
            raise ValueError(
                f"adapter {name!r} on the LM head is a {type(head).__name__}"
                f"{' variant' if isinstance(head, LoraLayer) else ''}: only plain LoRA is supported there"
            )
        if name not in head.lora_A:
            continue
        a, b = head.lora_A[name], head.lora_B[name]
        if b.bias is not None:
            raise ValueError(f"adapter {name!r} on the LM head has lora_bias, which isn't supported there")
        # FSDP2 would gather A's weight before the head's forward, which isn't called
        gathered = {"weight": _unsharded(a.weight)}
        hidden = head.lora_dropout[name](hidden_NH.to(a.weight.dtype))
        inputs.append(torch.func.functional_call(a, gathered, (hidden,)) * head.scaling[name])
        matrices.append(_unsharded(b.weight))
    if not inputs:
        return None
    return torch.cat(inputs, dim=1), torch.cat(matrices, dim=1)
