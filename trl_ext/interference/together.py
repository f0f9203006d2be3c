"""What processes do together for a logged step, so that all of it happens or none: exchanges, each agreed on before.

A process that runs out of memory between two exchanges would leave the others waiting for ever. So everything that an
exchange needs is there before the processes agree on it, and one that has failed says so in the place of its next
exchange: all of them drop what they were attempting.

Shapes: R processes, B rows of this process, K numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PIECE = 4 << 20  # bytes that a process sends at a time


class OnAnotherProcessError(Exception):
    """What was attempted failed, on a process that isn't this one."""


class Together:
    """Exchanges of an ``Accelerator``'s processes; with one process, nothing of the kind."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.processes = accelerator, accelerator.num_processes
        self._failed = torch.zeros(1, device=accelerator.device)  # made while there is memory

    def _all_well(self, well: bool) -> bool:
        if self.processes == 1:
            return well
        self._failed.fill_(0.0 if well else 1.0)
        dist.all_reduce(self._failed)
        return self._failed.item() == 0

    def agree(self) -> None:
        """Before an exchange: raises ``OnAnotherProcessError`` where another process has failed."""
        if not self._all_well(True):
            raise OnAnotherProcessError("it failed on another process")

    def attempt(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, or its error, or ``OnAnotherProcessError``: on all processes a result, or on none."""
        try:
            done = work()
        except OnAnotherProcessError:
            raise
        except Exception:
            self._all_well(False)
            raise
        self.agree()
        return done

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over processes, in place where it can be."""
        if self.processes == 1:
            return values
        values = values.to(self.accelerator.device).contiguous()
        self.agree()
        dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(R * B, ...) of (B, ...), the same B on every process."""
        if self.processes == 1:
            return values
        values = values.to(self.accelerator.device).contiguous()
        gathered = values.new_empty(self.processes * len(values), *values.shape[1:])
        self.agree()
        dist.all_gather_into_tensor(gathered, values)
        return gathered

    def columns(self, values_BK: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(R * B, K / R), rounded up and filled with zeros: of every process's rows the same columns, others on each
        process; and the number of the first. A process sends and gets what it had."""
        if self.processes == 1:
            return values_BK, 0
        values_BK = values_BK.to(self.accelerator.device)
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
        return received.view(-1, width), width * self.accelerator.process_index
