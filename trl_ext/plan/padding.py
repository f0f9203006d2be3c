"""Which columns of padding can be cut with the same result: by what is known of models, and as this one behaves.

A model may hide what moves it: HunYuan has a norm after its rotation, which no name tells. So where the rule would cut,
the model itself is asked first, once, on a few tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from trl_ext.probe_model import can_be_asked, evaluation_mode, multiplies_in_half, some_ids
from trl_ext.say_once import SayOnce

TOKENS, LEFT, RIGHT = 8, 24, 8  # of the row that asks, and the padding around it
# of what is said at the tokens, relative: rounding alone gives 1e-7 and, rotated in bf16, 1e-2
TOLERANCE = 1e-5
HALF_TOLERANCE = 5e-2
# a norm's weight after the rotation: found by asking, and named for models that can't be asked
NORM_AFTER_ROTATION = ("hunyuan_v1_dense", "hunyuan_v1_moe")


def trimmed_columns(
    model: Any, accelerator: Accelerator, say_once: SayOnce, *, prepared: bool = False
) -> tuple[bool, bool]:
    """Whether columns of padding can be cut before prompts, and after completions; said where the model objects.

    By the rule alone where the model can't be run yet: its parameters on other processes, or not loaded.
    ``prepared``: the engine has the model.
    """
    left, right = columns_by_rule(model)
    if not left or not can_be_asked(model, accelerator, prepared=prepared):
        return left, right
    try:
        moved, half = multiplies_in_half(model, lambda: moved_by_padding(model))
    except Exception as error:
        say_once(f"Padding before prompts stays: the model couldn't be asked ({type(error).__name__}: {error}).")
        return False, right
    if moved <= (HALF_TOLERANCE if half else TOLERANCE):
        return left, right
    say_once(f"Padding before prompts stays: what the model says changes with it, by {moved:.1e} of its size.")
    return False, right


def moved_by_padding(model: Any) -> float:
    """How far logits of some tokens are from those of the same tokens after and before padding, relative."""
    ids = some_ids(model, 1, TOKENS)
    mask = torch.ones_like(ids)
    with evaluation_mode(model), torch.no_grad():
        bare = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wide = [torch.nn.functional.pad(x, (LEFT, RIGHT)) for x in (ids, mask)]
        padded = model(input_ids=wide[0], attention_mask=wide[1], use_cache=False).logits
    bare, padded = bare.double(), padded[:, LEFT : LEFT + TOKENS].double()
    return float((padded - bare).norm() / bare.norm())


def columns_by_rule(model: Any) -> tuple[bool, bool]:
    """Whether columns of padding can be cut before prompts, and after completions, with the same result.

    Before prompts: with rotary positions alone, where only differences count; not with a state that runs over the
    padding (Mamba, convolutions), nor with attention in chunks or scales counted from the first column, nor with
    layers that have a scale in place of the rotation (Beam), nor with virtual tokens of an adapter (prompt tuning and
    the like), which stand before the padding. Neither where the rotation depends on the length (``dynamic``,
    ``longrope``).
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
