"""The LM head's whole weight, bias and LoRA factors: from FSDP2's shards or ZeRO-3's, tied or not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor, Partial

from grpo_kernels.interference.layer_taps import opened
from trl_ext.compat import maybe_gather_lm_head_ctx


@contextmanager
def gathered_head(head: torch.nn.Module, hidden_NH: torch.Tensor, *, keep: bool):
    """The head's whole weight, bias and low-rank adapter: from FSDP2's shards or ZeRO-3's, tied or not.

    ``keep``: the weight is needed again in the backward, when ZeRO-3 has taken its parts away: a copy then.
    """
    low_rank, head = None, opened(head)
    if isinstance(head, BaseTunerLayer):
        low_rank = head_adapter(head, hidden_NH)
        head = cast(torch.nn.Module, head.get_base_layer())
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    weight, bias = _whole(weight), _whole(bias)
    with maybe_gather_lm_head_ctx(weight, bias):
        if hasattr(weight, "ds_id") and keep and torch.is_grad_enabled():
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        yield weight, bias, low_rank


def _whole(parameter: Any) -> Any:
    """The parameter of all FSDP2 shards, its gradient the mean over processes of each one's, as FSDP2's own are.

    (``full_tensor()`` alone would take every process's gradient for the same, and keep one process's of each shard.)
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def head_adapter(head: BaseTunerLayer, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """LoRA on the LM head as factors, ((N, R) scaled ``A(hidden)``, (V, R) ``B``), of all active adapters.

    None where it is switched off or merged. Raises ``ValueError`` for adapters that aren't plain LoRA.
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
        own = {"weight": _whole(a.weight)}  # FSDP2 gathers it with the head's, before a forward that isn't called
        hidden = head.lora_dropout[name](hidden_NH.to(a.weight.dtype))
        inputs.append(torch.func.functional_call(a, own, (hidden,)) * head.scaling[name])
        matrices.append(_whole(b.weight))
    if not inputs:
        return None
    return torch.cat(inputs, dim=1), torch.cat(matrices, dim=1)
