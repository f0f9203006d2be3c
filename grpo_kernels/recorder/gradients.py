"""Reads the gradients that the optimizer is about to use.

With one rank and DDP they are in ``.grad``. With FSDP2 ``.grad`` is a DTensor, of which each rank has a shard. An
engine that keeps them elsewhere (DeepSpeed) passes a function that returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from grpo_kernels.interference.tap_check import GradientShard

from .collectives import Collectives

FullGradient = Callable[[torch.nn.Parameter], torch.Tensor | None]


class GradientShards(Sequence[GradientShard | None]):
    """This rank's shard of each parameter's gradient; None for a parameter without a gradient.

    FSDP2's row shards are used as they are. ``full_gradient``'s, and DTensors that aren't sharded by rows, are gathered
    one at a time. That is a collective, so every rank must read the same entries in the same order.

    Args:
        parameters: the parameters.
        collectives: the ranks' collectives.
        full_gradient: gathers a parameter's gradient, if it isn't in ``.grad``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        collectives: Collectives,
        full_gradient: FullGradient | None = None,
    ) -> None:
        self.parameters, self._collectives, self.processes = parameters, collectives, collectives.processes
        self._full_gradient = full_gradient

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, number: Any) -> Any:
        parameter = self.parameters[number]
        gradient: Any = parameter.grad
        if self._full_gradient is not None:
            self._collectives.agree()
            gradient = self._full_gradient(parameter)
        if gradient is None:
            return None
        if not isinstance(gradient, DTensor):
            return GradientShard(gradient, copies=self.processes)
        shard = first_row_of(gradient)
        if shard is None:
            self._collectives.agree()
            return GradientShard(gradient.full_tensor(), copies=self.processes)
        first_row, shards = shard
        return GradientShard(gradient.to_local(), first_row, self.processes // shards)

    def squared_norms(self) -> list[float]:
        """Returns the squared norm of each parameter's gradient, 0.0 without one, with a single all-reduce.

        It computes norms of rows first, which copies no gradient and keeps float32 sums short.
        """
        device = self._collectives.device
        squares = []
        for part in self:
            if part is None or not part.rows.numel():
                squares.append(torch.zeros((), dtype=torch.float64, device=device))
                continue
            wide = torch.promote_types(part.rows.dtype, torch.float32)
            norms = torch.linalg.vector_norm(part.rows.detach(), dim=-1, dtype=wide)
            squares.append(norms.double().square().sum().to(device) / part.copies)
        return self._collectives.sum(torch.stack(squares)).tolist()


def first_row_of(gradient: DTensor) -> tuple[int, int] | None:
    """Returns this rank's first row and the number of shards; None if the gradient isn't sharded by rows only.

    Rows are distributed as by ``torch.chunk``: equally, with fewer or none in the last shards.
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
            raise ValueError(f"this rank has {gradient.to_local().shape[0]} rows of a gradient: expected {held}")
    return first, shards
