"""Decides which columns of padding can be trimmed without changing the result.

A rule decides by the model's configuration and modules. It may miss a dependence on padding: HunYuan has a norm after
its rotation, which no name reveals. So before padding on the left is trimmed, a forward pass of a few tokens checks it.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.log_once import LogOnce
from trl_ext.probe_model import detect_half_products, evaluation_mode, is_loaded, probe_ids

TOKENS, LEFT, RIGHT = 8, 24, 8  # tokens of the probe's row, and the padding on its left and right
# The largest relative change of the logits that passes. Rounding alone gives 1e-7, and 1e-2 with rotations in bf16.
TOLERANCE = 1e-5
HALF_TOLERANCE = 5e-2
# A norm after the rotation. The probe finds it; these names are for models that can't be probed.
NORM_AFTER_ROTATION = ("hunyuan_v1_dense", "hunyuan_v1_moe")


def trimmed_columns(model: Any, log_once: LogOnce) -> tuple[bool, bool]:
    """Returns whether padding can be trimmed before prompts, and after completions; logs what the probe refuses.

    The rule alone decides if the model can't run because its parameters aren't loaded.
    """
    left, right = columns_by_rule(model)
    if not left or not is_loaded(model):
        return left, right
    try:
        change, half = detect_half_products(model, lambda: change_by_padding(model))
    except Exception as error:
        log_once(f"Padding before prompts stays: the probe of the model failed ({type(error).__name__}: {error}).")
        return False, right
    if change <= (HALF_TOLERANCE if half else TOLERANCE):
        return left, right
    log_once(f"Padding before prompts stays: the model's output depends on it (relative change {change:.1e}).")
    return False, right


def change_by_padding(model: Any) -> float:
    """Returns the relative change of a row's logits when padding is added on both sides."""
    ids = probe_ids(model, 1, TOKENS)
    mask = torch.ones_like(ids)
    with evaluation_mode(model), torch.no_grad():
        bare = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wide = [torch.nn.functional.pad(x, (LEFT, RIGHT)) for x in (ids, mask)]
        padded = model(input_ids=wide[0], attention_mask=wide[1], use_cache=False).logits
    bare, padded = bare.double(), padded[:, LEFT : LEFT + TOKENS].double()
    return float((padded - bare).norm() / bare.norm())


def columns_by_rule(model: Any) -> tuple[bool, bool]:
    """Returns whether padding can be trimmed before prompts, and after completions, by configuration and modules.

    Before prompts it can be trimmed only with rotary positions, where only differences of positions matter. It can't:

    * with a recurrent state that runs over the padding (Mamba, convolutions);
    * with attention in chunks, or attention scales, that are counted from the first column;
    * with layers that have a scale in place of the rotation (Beam);
    * with an adapter's virtual tokens (prompt tuning), which stand before the padding.

    Neither side can be trimmed if the rotation depends on the row's length (``dynamic``, ``longrope``).
    """
    config = model.config.get_text_config()
    absolute = getattr(config, "attention_chunk_size", None) or getattr(config, "attn_temperature_tuning", None)
    absolute = absolute or config.model_type in NORM_AFTER_ROTATION
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in [rope, *rope.values()] if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        return False, False
    adapters = getattr(model, "peft_config", {}).values()
    virtual = any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)
    names = {type(module).__name__.lower() for module in model.modules()}
    stateful = any(word in name for name in names for word in ("mamba", "conv", "rwkv", "deltanet", "recurrent", "ssm"))
    rotary = any("rotary" in name for name in names)
    scaled = any("llama_4_scaling_beta" in part for part in [rope, *rope.values()] if isinstance(part, dict))
    scaled = scaled or (any(isinstance(part, dict) for part in rope.values()) and None in rope.values())
    return rotary and not (stateful or scaled or absolute or virtual), True
