"""Alternating timing: every contender takes its turn in each round, so that a noisy machine is noisy for all."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import TrainerCallback


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
                wait()
                seconds[name].append((time.perf_counter() - start) / inner)
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in seconds.items()}


class StepSeconds(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.seconds.append(time.perf_counter() - self.start)


def in_fresh_process(function: Callable[..., int], *arguments: object) -> int:
    """Calls the function in a new process, whose allocator has no freed memory to reuse."""
    # glibc gives freed memory back at once: resident memory is memory in use
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
