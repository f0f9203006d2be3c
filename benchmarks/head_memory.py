"""Peak memory of a call, and of one contender of the head beyond inputs and returned gradients."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import head_contenders as heads
import torch

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def in_use() -> int:
    """Bytes in use now, on the GPU where there is one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()


def peak_beyond_now(call: Callable[[], object]) -> int:
    """The most bytes in use during the call, beyond what is in use before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before, peak, running = resident(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    running = False
    watcher.join()
    return peak - before


def head_peak(contender: str, shape: str, frozen: bool) -> int:
    """Peak bytes of a contender, to be measured in a fresh process."""
    call, device = heads.CONTENDERS[contender], "cuda" if torch.cuda.is_available() else "cpu"
    small = heads.make_problem("SmolLM2", 16, torch.float32, frozen=frozen, live=1.0)
    heads.backward(call, small)()  # libraries
    problem = heads.make_problem(shape, 512, torch.float32, frozen=frozen, live=1.0, device=device)
    returned = problem.hidden.nbytes + (0 if frozen else problem.weight.nbytes)
    return peak_beyond_now(heads.backward(call, problem)) - returned
