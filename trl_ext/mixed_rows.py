"""Models in which a sequence's result depends on those that run beside it."""

from __future__ import annotations

from typing import Any


def mixes_rows(model: Any) -> str | None:
    """What of the model's adapters makes a sequence's result depend on those that run beside it, or None."""
    kinds = {getattr(adapter, "peft_type", None) for adapter in getattr(model, "peft_config", {}).values()}
    return "Lily's router averages over all tokens that run together" if "LILY" in kinds else None
