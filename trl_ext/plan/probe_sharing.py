"""Whether a model gives the same when each prompt runs once: by its configuration, and by a few tokens both ways."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.compat import RunSettings
from trl_ext.head.forward import HeadCall
from trl_ext.head.settings import backbone
from trl_ext.probe_model import can_be_asked, evaluation_mode, multiplies_in_half, some_ids
from trl_ext.sharing.attention import NotShared
from trl_ext.sharing.hooks import let_share
from trl_ext.sharing.packed_rows import KEYWORD

from .padding import HALF_TOLERANCE, TOLERANCE


def why_not_shared(run: RunSettings, model: Any, trim_prompts: bool, *, prepared: bool = False) -> str | None:
    """Why every sequence runs with a prompt of its own, or None; the model, with our head, is asked, by a few tokens,
    both ways.

    ``trim_prompts``: whether padding before prompts can be left out (``columns.py``): where it can't, positions aren't
    relative, or a state runs over the row. ``prepared``: the engine has the model.
    """
    if not run.options.share_prompts:
        return "share_prompts=False"
    if not run.options.fused_loss:
        return "fused_loss=False"
    if not trim_prompts:
        return "what the model says of a token depends on what stands before the sequence"
    if run.torch_compile:
        return "torch_compile=True"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is on several devices"
    if not can_be_asked(model, run.accelerator, prepared=prepared):
        return "the model's parameters aren't loaded"
    undo = let_share(without_adapters(model))
    try:
        moved, half = multiplies_in_half(model, lambda: moved_by_sharing(model))
    except Exception as error:
        return f"the model can't run so ({type(error).__name__}: {error})"
    finally:
        undo()
    if not moved <= (HALF_TOLERANCE if half else TOLERANCE):
        return f"what the model says changes with it, by {moved:.1e} of its size"
    return None


def without_adapters(model: Any) -> Any:
    """The model without an adapter's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def moved_by_sharing(model: Any) -> float:
    """How far hidden states of two prompts' three answers are from those of rows of their own, relative."""
    ids = some_ids(model, 3, 12)
    ids[1, :6] = ids[0, :6]
    mask = torch.ones_like(ids)
    mask[2, :2] = mask[0, 10:] = 0  # a shorter prompt, a shorter answer
    seen: list[tuple[Any, torch.Tensor]] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs.get(KEYWORD), output.last_hidden_state))

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = backbone(base).register_forward_hook(see, with_kwargs=True)
    try:  # the whole model is called, before which FSDP and ZeRO gather what it is made of
        with evaluation_mode(model), torch.no_grad():
            for width in (None, 6):
                call = HeadCall(prompt_width=width)
                model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, head_call=call)
    finally:
        hook.remove()
    (_, own), (rows, (packed,)) = seen
    if getattr(model.config.get_text_config(), "sliding_window", None) and rows.windows == {None}:
        raise NotShared("its sliding window is in the mask alone")
    shared, own = packed[rows.packed_BC[mask.bool()]].double(), own[mask.bool()].double()
    return float((shared - own).norm() / own.norm())
