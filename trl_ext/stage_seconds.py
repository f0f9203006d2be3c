"""Where an optimizer step's time goes: seconds by stage, logged under ``compute/``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageSeconds:
    """Sums the seconds of each stage until ``take`` is called, at the end of an optimizer step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, counts: bool = True) -> Iterator[None]:
        """``counts``: False in evaluation, which belongs to no step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if counts:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """``compute/seconds_<stage>``; ``training`` is the rest: planning, forward, backward, logging interference."""
        whole = self._seconds.pop("step", 0.0)
        self._seconds["training"] = max(0.0, whole - sum(self._seconds.values()))
        taken = {f"compute/seconds_{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)  # a stage that the next step hasn't takes none of its time
        return taken
