"""Reads the gradients that DeepSpeed's optimizer is about to use.

ZeRO keeps them in the optimizer and frees them in its step, which runs inside the last backward, so they are read just
before it. Other engines leave them in ``.grad`` (``grpo_kernels/recorder/gradients.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from grpo_kernels.recorder.gradients import FullGradient


def full_gradient_of(accelerator: Accelerator) -> FullGradient | None:
    """Returns the function that gathers a parameter's gradient from ZeRO; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None

    def full_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    return full_gradient


@contextmanager
def before_deepspeed_steps(accelerator: Accelerator, callback: Callable[[], None]) -> Iterator[None]:
    """Calls ``callback`` before an optimizer step of DeepSpeed in this context; never without DeepSpeed."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None:
        yield
        return
    engine = wrapped.engine
    step = engine.step

    def step_after_callback(*args: Any, **kwargs: Any) -> Any:
        callback()
        return step(*args, **kwargs)

    engine.step = step_after_callback
    try:
        yield
    finally:
        del engine.step  # restores the class's method
