"""Chooses the number of threads with which a model of a million parameters is trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

TRIALS = 3  # steps timed with each number of threads


@contextmanager
def quickest_threads(step: Callable[[], object]) -> Iterator[None]:
    """Within, torch uses as many threads as make ``step`` quickest now: 1, 2, 4, ... up to what it is set to.

    A model of a million parameters has little work for many threads, and threads that wait for busy cores are slower
    than one (measured on two cores: 86 ms a step with two threads and 129 with one where nothing else ran, 590 and 260
    beside two other warm-ups). ``step`` must leave nothing behind.
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
                if trial:  # the first is warmer afterwards
                    seconds[count].append(time.perf_counter() - start)
        if len(counts) > 1:
            torch.set_num_threads(min(counts, key=lambda count: statistics.median(seconds[count])))
        yield
    finally:
        torch.set_num_threads(most)
