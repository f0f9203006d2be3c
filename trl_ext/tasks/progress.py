"""Prints the progress of a built-in policy's warm-up, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

REPORTED = 25  # steps between two reports of the first phase


class Progress:
    """Prints a message at the start, and at each report the accuracy and an upper bound of the remaining time.

    Args:
        most_steps: the most steps of the first phase, which ends earlier once the policy is accurate enough.
        rest: the most that the second phase costs, in steps of the first.
    """

    def __init__(self, most_steps: int, rest: int) -> None:
        self.most_steps, self.rest, self._started, self._last = most_steps, rest, time.monotonic(), 0
        self._print(
            "Warming the built-in policy up: supervised learning of a model of a million parameters, on this CPU, "
            "once; later calls find it in a cache."
        )

    def __call__(self, step: int, accuracy: float | Mapping[str, float]) -> None:
        seconds = time.monotonic() - self._started
        in_first_phase = self._last < step <= self.most_steps and step % REPORTED == 0
        self._last = step
        if isinstance(accuracy, Mapping):
            shown = ", ".join(f"{task} {value:.2f}" for task, value in accuracy.items())
        else:
            shown = f"{accuracy:.2f}"
        left = (self.most_steps - step + self.rest) * seconds / max(step, 1)
        time_left = f"{seconds:.0f} s, at most {left:.0f} s to go" if in_first_phase else f"ready after {seconds:.0f} s"
        self._print(f"  step {step:>3}: right with probability {shown} ({time_left})")

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
