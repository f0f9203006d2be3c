"""Runs the micro-batches of a call of ``training_step``; repeats a step that ran out of memory at half the size."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .micro_batches import MicroBatches


def run_call(
    batches: MicroBatches,
    first: Callable[[], torch.Tensor],
    further: Callable[[], torch.Tensor],
    on_repeat: Callable[[], None],
) -> torch.Tensor:
    """Returns the sum of the losses of the call's micro-batches.

    Args:
        first: runs forward and backward of a micro-batch, and counts the call.
        further: runs forward and backward of another micro-batch of the same call.
        on_repeat: is called before the step is repeated.

    Raises:
        torch.OutOfMemoryError: the step can't be repeated; the message says what to set.
    """
    losses: list[torch.Tensor] = []
    counted = False
    batches.start_call()
    while not counted or batches.waiting:
        failed = False
        try:
            losses.append(further() if counted else first())
            counted = True
        except torch.OutOfMemoryError as error:
            if not batches.running:  # generation, or a reward function
                raise
            advice = batches.why_not_repeated()
            if advice is not None:
                raise torch.OutOfMemoryError(f"{error}\n{advice}") from error
            failed = True
        if failed:  # outside of the handler, where the error's frames would keep the step's tensors
            batches.repeat_smaller()
            losses = []
            on_repeat()
    return batches.count_loss(losses)
