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
from torch.distributed.tensor import DTensor, Shard

from grpo_kernels.interference.tap_check import GradientPart

from .collectives import Collectives


class GradientParts(Sequence[GradientPart | None]):
    """Of each parameter the part that this process has, so that sums over processes are of the whole; None: there is
    none.

    FSDP2's shards stay where they are. ZeRO's are fetched whole, one at a time, which is a collective call, as is the
    fetch of a DTensor that is cut otherwise: every process asks for the same ones in the same order.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], collectives: Collectives) -> None:
        self.parameters, self._collectives, self.processes = parameters, collectives, collectives.processes
        self._zero = collectives.accelerator.distributed_type == DistributedType.DEEPSPEED

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, number: Any) -> Any:
        parameter = self.parameters[number]
        gradient: Any = parameter.grad
        if self._zero:
            from deepspeed.utils import safe_get_full_grad

            self._collectives.agree()
            gradient = safe_get_full_grad(parameter)
        if gradient is None:
            return None
        if not isinstance(gradient, DTensor):
            return GradientPart(gradient, copies=self.processes)
        shard = first_row_of(gradient)
        if shard is None:
            self._collectives.agree()
            return GradientPart(gradient.full_tensor(), copies=self.processes)
        first_row, shards = shard
        return GradientPart(gradient.to_local(), first_row, self.processes // shards)

    def squared_norms(self) -> list[float]:
        """Of each parameter's gradient; 0.0 where there is none.

        The rows' norms first: no copy of a gradient is made, and float32 sums stay short. One exchange, and one wait
        for the device.
        """
        device = self._collectives.accelerator.device
        squares = []
        for part in self:
            if part is None or not part.rows.numel():
                squares.append(torch.zeros((), dtype=torch.float64, device=device))
                continue
            norms = torch.linalg.vector_norm(part.rows.detach(), dim=-1, dtype=torch.float32)
            squares.append(norms.double().square().sum().to(device) / part.copies)
        return self._collectives.sum(torch.stack(squares)).tolist()


def first_row_of(gradient: DTensor) -> tuple[int, int] | None:
    """The first of the rows that are here, and over how many shards they are spread; None: it isn't cut by rows alone.

    Rows are dealt out as ``torch.chunk`` does: equally, the last shards fewer or none.
    """
    first, shards = 0, 1
    for dim, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or placement.dim != 0 or shards > 1:
            return None
        shards = gradient.device_mesh.size(dim)
        each = -(-gradient.shape[0] // shards)
        first = min(each * gradient.device_mesh.get_local_rank(dim), gradient.shape[0])
        held = min(each, gradient.shape[0] - first)
        if gradient.to_local().shape[0] != held:
            raise ValueError(f"{gradient.to_local().shape[0]} rows of a gradient are here, not {held}")
    return first, shards


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
