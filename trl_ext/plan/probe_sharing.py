"""Checks that a model gives the same hidden states when each prompt runs once for all its completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trl_ext.checkpointed_layers import without_adapters
from trl_ext.compat import RunSettings
from trl_ext.head.forward import HeadCall
from trl_ext.head.settings import backbone
from trl_ext.probe_model import detect_half_products, evaluation_mode, is_loaded, probe_ids
from trl_ext.sharing.attention import NotShared
from trl_ext.sharing.hooks import add_sharing_hooks
from trl_ext.sharing.packed_rows import KEYWORD

from .padding import HALF_TOLERANCE, TOLERANCE


def why_not_shared(run: RunSettings, model: Any, trim_prompts: bool) -> str | None:
    """Returns why prompts can't be shared, or None if they can.

    It checks options first, then runs a few tokens through the model with our head, with and without sharing.

    Args:
        trim_prompts: whether padding before prompts can be trimmed (``padding.py``). If it can't, positions aren't
            relative, or a recurrent state runs over the row, and prompts can't be shared either.
    """
    if not run.options.share_prompts:
        return "share_prompts=False"
    if not run.options.fused_loss:
        return "fused_loss=False"
    if not trim_prompts:
        return "the model's output depends on the padding before the sequence"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is on several devices"
    if not is_loaded(model):
        return "the model's parameters aren't loaded"
    undo = add_sharing_hooks(without_adapters(model))
    try:
        change, half = detect_half_products(model, lambda: change_by_sharing(model))
    except Exception as error:
        return f"the model can't run packed rows ({type(error).__name__}: {error})"
    finally:
        undo()
    if not change <= (HALF_TOLERANCE if half else TOLERANCE):
        return f"the model's output changes (relative change {change:.1e})"
    return None


def change_by_sharing(model: Any) -> float:
    """Returns the relative change of the hidden states when three completions of two prompts share their prompts.

    Raises ``NotShared`` if a sliding window is applied only by the attention mask, which packed rows don't have.
    """
    ids = probe_ids(model, 3, 12)
    ids[1, :6] = ids[0, :6]
    mask = torch.ones_like(ids)
    mask[2, :2] = mask[0, 10:] = 0  # a shorter prompt, a shorter completion
    captured: list[tuple[Any, torch.Tensor]] = []

    def capture(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        captured.append((kwargs.get(KEYWORD), output.last_hidden_state))

    hook = backbone(without_adapters(model)).register_forward_hook(capture, with_kwargs=True)
    try:  # calls the outermost model, whose hooks gather the parameters with FSDP and ZeRO
        with evaluation_mode(model), torch.no_grad():
            for width in (None, 6):
                call = HeadCall(prompt_width=width)
                model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, head_call=call)
    finally:
        hook.remove()
    (_, own), (rows, (packed,)) = captured
    if getattr(model.config.get_text_config(), "sliding_window", None) and rows.windows == {None}:
        raise NotShared("only its attention mask has the sliding window")
    shared, own = packed[rows.packed_BC[mask.bool()]].double(), own[mask.bool()].double()
    return float((shared - own).norm() / own.norm())
