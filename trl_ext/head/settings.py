"""Reads from a model's configuration how it computes logits from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class HeadSettings:
    """How logits are computed: ``softcap * tanh(logit_scale * y / softcap) / temperature`` with y = hidden @ weight.T.

    Attributes:
        temperature: returns the current temperature.
        softcap: None: no cap.
        cast_to_fp32: TRL's ``cast_lm_head_to_fp32``.
        n_experts, experts_per_token: of a mixture of experts, for its load-balancing loss; else None.
    """

    temperature: Callable[[], float] = lambda: 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    cast_to_fp32: bool = False
    n_experts: int | None = None
    experts_per_token: int | None = None


# Names of a factor on the logits in models' configurations; the first that is set is used, as in TRL's
# ``add_fused_lm_head``.
LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
LOGIT_DIVISOR = "logits_scaling"
MULTIPLIES_BY_ITS_DIVISOR = ("hyperclovax",)


def read_settings(
    model: torch.nn.Module, *, temperature: Callable[[], float] = lambda: 1.0, cast_to_fp32: bool = False
) -> HeadSettings:
    """Reads the settings. Raises ``ValueError`` if the model has no output embeddings, or no separate backbone."""
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"{type(model).__name__} has no output embeddings: it can't give log-probs")
    backbone(model)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    factors = [getattr(config, name, None) for name in LOGIT_FACTORS]
    logit_scale = next((float(factor) for factor in factors if factor is not None), None)
    divisor = getattr(config, LOGIT_DIVISOR, None)
    if logit_scale is None and divisor is not None:
        logit_scale = float(divisor) if config.model_type in MULTIPLIES_BY_ITS_DIVISOR else 1.0 / divisor
    return HeadSettings(
        temperature=temperature,
        logit_scale=1.0 if logit_scale is None else logit_scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        cast_to_fp32=cast_to_fp32,
        n_experts=getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None),
        experts_per_token=getattr(config, "num_experts_per_tok", None),
    )


def backbone(model: Any) -> Any:
    """Returns the model without its head. Raises ``ValueError`` if it has no separate backbone."""
    base = model.base_model
    if base is model:  # in Llama 4's text model base_model_prefix isn't the name of the backbone
        base = getattr(model, "model", None)
    if base is None:
        raise ValueError(f"{type(model).__name__} has no backbone apart from its head: use fused_loss=False")
    return base
