"""Reads from the run's settings what each logged step is compared with."""

from __future__ import annotations

from grpo_kernels.recorder.what_if_log import ComparedWith, compared_methods
from grpo_kernels.recorder.what_if_step import STATELESS
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.compat import RunSettings


def compared_with(run: RunSettings, now: UsedNormalization) -> ComparedWith:
    """Returns the normalisations to compare with; they get the run's options unless it uses a function."""
    options = run.options.normalization_kwargs
    methods = compared_methods(
        run.options.what_if, options if now.name is not None and isinstance(options, dict) else {}
    )
    used = now.name if now.name in STATELESS and not now.by_function else None
    return ComparedWith(methods, used, now.function_weights, run.prompts_per_generation)
