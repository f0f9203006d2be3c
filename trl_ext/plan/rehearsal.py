"""Finds how many packed tokens fit into a micro-batch: runs forward and backward of made-up rows, at two sizes.

Memory grows linearly with packed tokens (attention in parts, a head in tiles), so two sizes give its slope. Every token
but a few of the prompt counts in the loss, which takes the most memory. The pass changes nothing: gradients are
returned instead of accumulated, random states and buffers are restored, and no process communicates until the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from trl_ext.compat import LossSettings, RunSettings
from trl_ext.objective.fused import FusedObjective
from trl_ext.objective.interface import LossContext
from trl_ext.probe_model import probe_ids
from trl_ext.schema import REFERENCE, Sequences

from .device_memory import DeviceMemory

PROMPT = 16  # tokens of the made-up prompt
MARGIN = 0.2  # of the free memory, for what fragmentation and longer prompts take
STATES = 2  # tensors that an optimizer keeps of each parameter; Adam's number


class Rehearsal:
    """Measures the memory of micro-batches of ``model``, the policy without its engine's wrapper.

    ``forward_context`` returns the context in which a training forward runs.
    """

    def __init__(
        self, run: RunSettings, model: Any, settings: LossSettings, forward_context: Callable[[], Any]
    ) -> None:
        self.run, self.model, self.settings, self.forward_context = run, model, settings, forward_context
        self.objective = FusedObjective(run.accelerator.autocast)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def batch(self, rows: int) -> Sequences:
        """Returns ``rows`` made-up answers of the greatest length to one prompt."""
        width = self.settings.max_completion_length
        ids = probe_ids(self.model, rows, PROMPT + width)
        ones = torch.ones_like(ids)
        columns = {
            "prompt_ids": ids[:1, :PROMPT].expand(rows, -1),
            "prompt_mask": ones[:, :PROMPT],
            "completion_ids": ids[:, PROMPT:],
            "completion_mask": ones[:, PROMPT:],
            "advantages": torch.ones(rows, device=ids.device),
        }
        if self.settings.beta != 0:
            columns[REFERENCE] = torch.zeros(rows, width, device=ids.device)
        return Sequences(columns)

    def run_rows(self, rows: int) -> None:
        """Runs forward and backward of ``rows`` answers; their gradients are dropped."""
        batch = self.batch(rows)
        weights_B = torch.full((rows,), 1.0 / rows, device=batch.advantages.device)
        with self.forward_context():
            loss = self.objective.loss(self.model, batch, LossContext(self.settings, weights_B, 1.0, None, True)).loss
        torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def tokens(self, memory: DeviceMemory, optimizer_bytes: int) -> int:
        """Returns how many packed tokens fit.

        Args:
            optimizer_bytes: what the optimizer allocates at its first step, bytes.
        """
        few = max(self.run.train_batch_size // 2, 1)
        sizes = few, 2 * few
        with unchanged(self.model):
            self.run_rows(few)  # allocates what is kept: workspaces, caches
            free = memory.free()
            small, large = (memory.peak(partial(self.run_rows, rows)) for rows in sizes)
        small_tokens, large_tokens = (PROMPT + rows * self.settings.max_completion_length for rows in sizes)
        by_token = (large - small) / (large_tokens - small_tokens)
        if by_token <= 0:
            raise ValueError(f"{large_tokens} tokens took {large} bytes, and {small_tokens} took {small}")
        constant = small - by_token * small_tokens
        return int(((free - optimizer_bytes) * (1 - MARGIN) - constant) / by_token)


def tokens_that_fit(
    rehearsal: Rehearsal, memory: DeviceMemory, optimizer_bytes: int, least_over_ranks: Callable[[int], int]
) -> int | None:
    """Returns the least number of packed tokens that fit on any rank; None, with a reason in the log, if unknown.

    All ranks call it at the same time.
    """
    found = -1  # a rank that failed reports it, and then no rank uses another's number
    try:
        found = max(rehearsal.tokens(memory, optimizer_bytes), 1)
    except Exception as error:  # also torch.OutOfMemoryError: then TRL's own micro-batch hardly fits either
        rehearsal.run.log_once(f"A micro-batch's memory isn't measured ({type(error).__name__}: {error}).")
    least = least_over_ranks(found)
    return None if least < 0 else least


def bytes_of_optimizer(parameters: list[torch.Tensor], optimizer: Any) -> int:
    """Returns how many bytes the optimizer will allocate for its state; 0 if it has one already."""
    if getattr(optimizer, "state", None):
        return 0
    return sum(STATES * p.numel() * p.element_size() for p in parameters)


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Runs the model in train mode in this context; restores modes, buffers and random states afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            model.train()
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
