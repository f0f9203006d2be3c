"""Alternating timing: every contender takes its turn in each round, so that a noisy machine is noisy for all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch


def alternate(contenders: dict[str, Callable[[], object]], *, rounds: int = 30, inner: int = 1) -> dict[str, float]:
    """Median seconds of one call of each contender, over ``rounds`` rounds of ``inner`` calls."""
    for call in contenders.values():
        call()  # warm-up: compilation, caches
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                for _ in range(inner):
                    call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[name].append((time.perf_counter() - start) / inner)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in seconds.items()}
