"""Patches the forward of the policy and the reference model while a trainer uses them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from trl_ext.compat import RunSettings, forward_without_trl_head

from .forward import FusedHead, HeadCall, HeadSketches
from .settings import read_settings
from .weights import head_adapter

HEAD = "_curvature_grpo_head"  # attribute of a model while a trainer uses it
PLAIN_CALL = HeadCall()  # TRL's own call, for log-probs


def fused_heads(
    run: RunSettings, model: Any, ref_model: Any, head_sketch: HeadSketches, size_of: Callable[[int], int]
) -> list[Callable[[], Callable[[], None]]]:
    """Returns the patches (``model_patches.py``) that give our head to the policy and to TRL's ``ref_model``, if any.

    ``size_of`` returns the size to which a packed row of the policy is padded.

    Raises ``ValueError`` for a model without output embeddings, or with an adapter on them that isn't plain LoRA.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    settings = read_settings(base, temperature=run.temperature, cast_to_fp32=run.cast_lm_head_to_fp32)
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        if settings.cast_to_fp32:
            raise ValueError("cast_lm_head_to_fp32=True can't be used with an adapter on lm_head")
        # raises ValueError for an unsupported adapter
        head_adapter(head, torch.zeros(1, head.get_base_layer().in_features, device=model.device))
    policy_head = FusedHead(settings, entropy=True, head_sketch=head_sketch, size_of=size_of)
    zero = run.accelerator.distributed_type == DistributedType.DEEPSPEED
    patches = [lambda: add_fused_head(base, policy_head)]
    if zero:
        patches.append(lambda: register_head_with_zero3(model, base))
    if ref_model is not None:
        reference = run.accelerator.unwrap_model(ref_model)
        reference_head = FusedHead(settings, entropy=False)
        if zero:
            patches.append(lambda: register_head_with_zero3(reference, reference))
        patches.append(lambda: add_fused_head(reference, reference_head))
    return patches


def register_head_with_zero3(outermost: torch.nn.Module, model: Any) -> Callable[[], None]:
    """Makes ZeRO-3 gather the head's parameters with the outermost module. Returns a function that undoes it.

    ZeRO-3 gathers a module's parameters before the module's forward and backward, but the head's forward isn't called.
    So the head's parameters are registered with the outermost module. The hook runs before the first forward, because
    ZeRO-3 records there which parameters it gathers when.
    """

    def register(module: torch.nn.Module, args: Any) -> None:
        import deepspeed

        for parameter in model.get_output_embeddings().parameters():
            if hasattr(parameter, "ds_id"):
                deepspeed.zero.register_external_parameter(module, parameter)

    return outermost.register_forward_pre_hook(register, prepend=True).remove


def add_fused_head(model: torch.nn.Module, head: FusedHead) -> Callable[[], None]:
    """Gives ``model`` (without PEFT's wrapper) this head. Returns a function that undoes it.

    If another trainer is using the model at the same time, undoing restores that trainer's head.
    """
    remove_forward, before = add_forward(model), getattr(model, HEAD, None)
    setattr(model, HEAD, head)

    def undo() -> None:
        delattr(model, HEAD)
        if before is not None:
            setattr(model, HEAD, before)
        remove_forward()

    return undo


def add_forward(model: torch.nn.Module) -> Callable[[], None]:
    """Replaces ``model.forward`` by one that uses the model's head, if it has one. Returns a function that undoes it.

    If another wrapper was put around our forward in the meantime (accelerate's, for autocast), undoing leaves both.
    """
    before = vars(model).get("forward")
    function = getattr(before, "__func__", None)
    while function is not None:
        if HEAD in vars(function):
            return lambda: None
        function = getattr(function, "__wrapped__", None)
    ours = _forward_with_head(model)
    model.forward = ours  # type: ignore[method-assign]

    def undo() -> None:
        if vars(model).get("forward") is not ours:
            return
        del model.forward
        if before is not None:
            model.forward = before  # type: ignore[method-assign]

    return undo


def _forward_with_head(model: Any) -> Any:
    """Returns a bound forward that uses the model's ``HEAD`` for calls with the labels that it takes.

    Any other call runs TRL's head if it asks for one and TRL has patched the model, or else the original forward.
    """
    original = forward_without_trl_head(model)
    bound = getattr(original, "__self__", None) is model
    # takes ``self``, so that a deep copy of the model runs the copy's own forward
    inner = original.__func__ if bound else lambda self, *args, **kwargs: original(*args, **kwargs)
    now = model.forward
    with_trl_head = now.__func__ if getattr(now, "__self__", None) is model else inner

    @functools.wraps(type(model).forward)  # keeps the signature, against which generate checks its arguments
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, head_call=PLAIN_CALL, **kwargs):
        head = getattr(self, HEAD, None)
        given = {"labels": labels, "shift_labels": shift_labels}
        given = {name: one for name, one in given.items() if one is not None}
        if head is not None and fused_lm_head and head.labels_name in given:
            return head(self, args, given[head.labels_name], head_call, kwargs)
        if fused_lm_head:
            return with_trl_head(self, *args, fused_lm_head=True, **given, **kwargs)
        return inner(self, *args, **given, **kwargs)

    setattr(forward, HEAD, True)
    return types.MethodType(forward, model)
