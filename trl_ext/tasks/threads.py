"""Chooses the number of threads for training a model of a million parameters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

TRIALS = 3  # steps to time with each number of threads


@contextmanager
def quickest_threads(step: Callable[[], object]) -> Iterator[None]:
    """Sets torch in this context to the number of threads with which ``step`` is fastest now.

    It tries 1, 2, 4, ... up to torch's current setting. A model of a million parameters has little work for many
    threads, and threads that wait for busy cores are slower than one. (Measured on two cores: a step takes 86 ms with
    two threads and 129 ms with one on an idle machine, but 590 and 260 ms while two other warm-ups run.) ``step`` must
    have no side effects.
    """
    most = torch.get_num_threads()
    counts = [count for count in (1 << power for power in range(most.bit_length())) if count < most] + [most]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for trial in range(TRIALS + 1 if len(counts) > 1 else 0):
            for count in counts:
                torch.set_num_threads(count)
                start = time.perf_counter()
                step()
                if trial:  # the first step is a warm-up
                    seconds[count].append(time.perf_counter() - start)
        if len(counts) > 1:
            torch.set_num_threads(min(counts, key=lambda count: statistics.median(seconds[count])))
        yield
    finally:
        torch.set_num_threads(most)
