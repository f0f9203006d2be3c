"""Measures how long generation, rewards, log-probs and training take in each step, logged under ``compute/``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageSeconds:
    """Sums the seconds of each stage until ``take`` is called, at the end of an optimizer step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []  # the innermost last
        self.on_change: Callable[[str], None] | None = None  # gets the name of the innermost stage

    @contextmanager
    def stage(self, name: str, counts: bool = True) -> Iterator[None]:
        """Adds the time spent in this context to the stage ``name``. ``counts`` is False in evaluation."""
        self._running.append(name)
        self._tell()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._running.pop()
            self._tell()
            if counts:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def _tell(self) -> None:
        if self.on_change is not None and self._running:
            self.on_change(self._running[-1])

    def take(self) -> dict[str, float]:
        """Returns ``compute/seconds_<stage>`` of the step that ends, and starts a new one.

        ``training`` is the rest of the step's time: planning, forward, backward, logging interference.
        """
        step = self._seconds.pop("step", 0.0)
        self._seconds["training"] = max(0.0, step - sum(self._seconds.values()))
        metrics = {f"compute/seconds_{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)  # stages that the next step lacks are logged as 0
        return metrics
