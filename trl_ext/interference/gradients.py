"""The gradients that the optimizer is about to use, wherever the engine keeps them.

One process and DDP: ``.grad``. FSDP2: ``.grad`` is a DTensor, of which each process has a shard. DeepSpeed's ZeRO keeps
them in the optimizer, whose step is part of the last backward, and forgets them there: they are looked at just before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


class WholeGradients(Sequence[torch.Tensor | None]):
    """Of each parameter, over all its shards, made when asked for, so that one is there at a time; None: there is none.

    Asking is a collective call where gradients are sharded: every process asks for the same ones in the same order.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
        self.parameters = parameters
        self.zero = accelerator.distributed_type == DistributedType.DEEPSPEED

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, number: Any) -> Any:
        parameter = self.parameters[number]
        if self.zero:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter)
        gradient = parameter.grad
        return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def squared_gradient_norms(parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> list[float]:
    """Of each parameter's gradient, over all shards; 0.0 where there is none.

    The rows' norms first: no copy of a gradient is made, and float32 sums stay short. FSDP2's shards are summed over
    processes in one exchange; ZeRO's gradients are fetched whole, one by one. One wait for the device in all.
    """
    whole = WholeGradients(parameters, accelerator)
    squares, sharded = [], False
    for number, parameter in enumerate(parameters):
        gradient = whole[number] if whole.zero else parameter.grad
        if gradient is None:
            squares.append(torch.zeros((), dtype=torch.float64, device=accelerator.device))
            continue
        copies = 1
        if isinstance(gradient, DTensor):
            sharded = True
            mesh, placements = gradient.device_mesh, gradient.placements
            for size, placement in zip(mesh.shape, placements, strict=True):
                copies *= size if placement.is_replicate() else 1
            gradient = gradient.to_local()
        elif accelerator.distributed_type == DistributedType.FSDP:
            copies = accelerator.num_processes
        norms = torch.linalg.vector_norm(gradient.detach(), dim=-1, dtype=torch.float32)
        squares.append(norms.double().square().sum().to(accelerator.device) / copies)
    total = torch.stack(squares)
    if sharded or accelerator.distributed_type == DistributedType.FSDP:
        total = accelerator.reduce(total, "sum")
    return total.tolist()


@contextmanager
def before_deepspeed_steps(accelerator: Accelerator, look: Callable[[], None]) -> Iterator[None]:
    """Calls ``look`` before DeepSpeed's optimizer step, which is the end of the backward within; else not at all."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None:
        yield
        return
    engine = wrapped.engine
    step = engine.step

    def looked(*args: Any, **kwargs: Any) -> Any:
        look()
        return step(*args, **kwargs)

    engine.step = looked
    try:
        yield
    finally:
        del engine.step  # the class's own again
