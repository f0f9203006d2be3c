"""Gives the policy and the reference model our forward while a trainer uses them."""

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

HEAD = "_curvature_grpo_head"  # of a model, while a trainer uses it
PLAIN_CALL = HeadCall()  # TRL's own: log-probs


def fused_heads(
    run: RunSettings,
    model: Any,
    ref_model: Any,
    head_sketch: HeadSketches,
) -> list[Callable[[], Callable[[], None]]]:
    """The patches (``model_patches.py``) that give the policy our head, with or without adapters around it, and TRL's
    ``ref_model`` where there is one.

    Raises ``ValueError`` for a model without output embeddings, or an adapter on them that isn't plain LoRA.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    settings = read_settings(base, temperature=run.temperature, cast_to_fp32=run.cast_lm_head_to_fp32)
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        if settings.cast_to_fp32:
            raise ValueError("cast_lm_head_to_fp32=True can't be used with an adapter on lm_head")
        head_adapter(head, torch.zeros(1, head.get_base_layer().in_features, device=model.device))  # refuses
    of_policy = FusedHead(settings, entropy=True, head_sketch=head_sketch)
    zero = run.accelerator.distributed_type == DistributedType.DEEPSPEED
    patches = [lambda: add_fused_head(base, of_policy)]
    if zero:
        patches.append(lambda: register_head_with_zero3(model, base))
    if ref_model is not None:
        reference = run.accelerator.unwrap_model(ref_model)
        of_reference = FusedHead(settings, entropy=False)
        if zero:
            patches.append(lambda: register_head_with_zero3(reference, reference))
        patches.append(lambda: add_fused_head(reference, of_reference))
    return patches


def register_head_with_zero3(outermost: torch.nn.Module, model: Any) -> Callable[[], None]:
    """ZeRO-3 gathers a module's parameters before its forward and its backward. The head's forward isn't called, so its
    parameters are registered with the outermost module, before the first forward, in which ZeRO-3 records what it
    gathers when. Returns what undoes it."""

    def register(module: torch.nn.Module, args: Any) -> None:
        import deepspeed

        for parameter in model.get_output_embeddings().parameters():
            if hasattr(parameter, "ds_id"):
                deepspeed.zero.register_external_parameter(module, parameter)

    return outermost.register_forward_pre_hook(register, prepend=True).remove


def add_fused_head(model: torch.nn.Module, head: FusedHead) -> Callable[[], None]:
    """Gives ``model``, without an adapter's wrapper around it, this head until the returned function is called, which
    gives it back the head of another trainer that is using it too."""
    remove_forward, before = add_forward(model), getattr(model, HEAD, None)
    setattr(model, HEAD, head)

    def undo() -> None:
        delattr(model, HEAD)
        if before is not None:
            setattr(model, HEAD, before)
        remove_forward()

    return undo


def add_forward(model: torch.nn.Module) -> Callable[[], None]:
    """Replaces ``model.forward`` by one that uses the model's head; without a head it calls the previous forward.

    Returns what undoes it. A wrapper that was put around it meanwhile (accelerate's, for autocast) stays with it.
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
    """A forward that uses the model's ``HEAD`` if it is set, and else calls the previous forward."""
    there = forward_without_trl_head(model)
    bound = getattr(there, "__self__", None) is model
    inner = (
        there.__func__ if bound else lambda self, *args, **kwargs: there(*args, **kwargs)
    )  # a deep copy's is its own

    # the signature stays: `generate` checks its arguments against it
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, head_call=PLAIN_CALL, **kwargs):
        head = getattr(self, HEAD, None)
        if head is None or not fused_lm_head or labels is None:
            if labels is not None:
                kwargs["labels"] = labels
            return inner(self, *args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
        return head(self, args, labels, head_call, kwargs)

    setattr(forward, HEAD, True)
    return types.MethodType(forward, model)
