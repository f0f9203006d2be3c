"""Runs collectives that can't hang: before each one, all ranks check that none of them has failed.

If a rank ran out of memory between two collectives, the others would wait for it for ever. So a rank allocates what a
collective needs before that check, and a rank that failed reports it instead of joining its next collective; then all
ranks abort.

Shapes: R ranks, B rows of this rank, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PIECE = 4 << 20  # bytes that a rank sends at once


def is_main_process() -> bool:
    """Returns whether this process logs and writes files: the first rank does, and a process without others."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class OtherRankFailedError(Exception):
    """Another rank failed in work that all ranks attempted."""

    def __init__(self) -> None:
        super().__init__("it failed on another process")


class Collectives:
    """The collectives of the default process group; with a single rank they return their argument.

    Args:
        device: this rank's device, to which the tensors are moved.
        processes, rank: the number of ranks and this one's; None: those of ``torch.distributed``, one without it.
    """

    def __init__(self, device: torch.device, processes: int | None = None, rank: int | None = None) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.device = device
        self.processes = (dist.get_world_size() if joined else 1) if processes is None else processes
        self.rank = (dist.get_rank() if joined else 0) if rank is None else rank
        self._failed = torch.zeros(1, device=device)  # allocated while there is memory

    def _all_ok(self, ok: bool) -> bool:
        if self.processes == 1:
            return ok
        self._failed.fill_(0.0 if ok else 1.0)
        dist.all_reduce(self._failed)
        return self._failed.item() == 0

    def agree(self) -> None:
        """Raises ``OtherRankFailedError`` if another rank has failed. Every rank calls it before a collective."""
        if not self._all_ok(True):
            raise OtherRankFailedError

    def attempt(self, work: Callable[[], T]) -> T:
        """Returns the result of ``work``, if it succeeds on all ranks; else every rank raises an error."""
        try:
            done = work()
        except OtherRankFailedError:
            raise
        except Exception:
            self._all_ok(False)
            raise
        self.agree()
        return done

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over ranks; may change ``values`` in place."""
        if self.processes == 1:
            return values
        values = values.to(self.device).contiguous()
        self.agree()
        dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gathers (B, ...) to (R * B, ...); B must be the same on every rank."""
        if self.processes == 1:
            return values
        values = values.to(self.device).contiguous()
        gathered = values.new_empty(self.processes * len(values), *values.shape[1:])
        self.agree()
        dist.all_gather_into_tensor(gathered, values)
        return gathered

    def columns(self, values_BK: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Redistributes rows to columns by an all-to-all.

        Returns:
            (R * B, K / R), this rank's columns of every rank's rows (K / R is rounded up, and filled with zeros), and
            the number of the first column.
        """
        if self.processes == 1:
            return values_BK, 0
        values_BK = values_BK.to(self.device)
        n_rows, n_columns = values_BK.shape
        width = -(-n_columns // self.processes)
        received = values_BK.new_zeros(self.processes, n_rows, width)
        step = max(1, PIECE // (self.processes * width * values_BK.element_size()))
        shape = (self.processes, min(step, max(n_rows, 1)), width)
        sent, arrived = values_BK.new_zeros(shape), values_BK.new_zeros(shape)
        self.agree()
        for start in range(0, n_rows, step):
            rows = values_BK[start : start + step]
            for process in range(self.processes):
                part = rows[:, process * width : (process + 1) * width]
                sent[process, : len(rows), : part.shape[1]] = part
            dist.all_to_all_single(arrived, sent)
            received[:, start : start + step] = arrived[:, : len(rows)]
        return received.view(-1, width), width * self.rank
