"""Prints the progress of a built-in policy's warm-up, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

REPORTED = 25  # steps between two reports of the first part


class Progress:
    """Prints at once what is being done, and at each report how far it is and how long it may still take.

    ``most_steps``: of the first part, which ends earlier where the policy has learned enough. ``rest``: what the second
    part costs at most, in steps of the first.
    """

    def __init__(self, most_steps: int, rest: int) -> None:
        self.most_steps, self.rest, self._started, self._last = most_steps, rest, time.monotonic(), 0
        self._print(
            "Warming the built-in policy up: supervised learning of a model of a million parameters, on this CPU, "
            "once; later calls find it in a cache."
        )

    def __call__(self, step: int, accuracy: float | Mapping[str, float]) -> None:
        seconds = time.monotonic() - self._started
        in_first_part = self._last < step <= self.most_steps and step % REPORTED == 0
        self._last = step
        if isinstance(accuracy, Mapping):
            told = ", ".join(f"{task} {value:.2f}" for task, value in accuracy.items())
        else:
            told = f"{accuracy:.2f}"
        left = (self.most_steps - step + self.rest) * seconds / max(step, 1)
        until = f"{seconds:.0f} s, at most {left:.0f} s to go" if in_first_part else f"ready after {seconds:.0f} s"
        self._print(f"  step {step:>3}: right with probability {told} ({until})")

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
