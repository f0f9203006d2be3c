"""What a built-in policy's warm-up prints while it goes, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping


class Progress:
    """Prints at once what is being done, and at each report how far it is and how long it may still take.

    ``most_steps``: of the part that takes nearly all the time; it ends earlier where the policy has learned enough.
    """

    def __init__(self, most_steps: int) -> None:
        self.most_steps, self._started = most_steps, time.monotonic()
        self._print(
            "Warming the built-in policy up: supervised learning of a model of a million parameters, on this CPU, "
            "once; later calls find it in a cache."
        )

    def __call__(self, step: int, accuracy: float | Mapping[str, float]) -> None:
        seconds = time.monotonic() - self._started
        left = max(self.most_steps - step, 0) * seconds / max(step, 1)
        if isinstance(accuracy, Mapping):
            told = ", ".join(f"{task} {value:.2f}" for task, value in accuracy.items())
        else:
            told = f"{accuracy:.2f}"
        self._print(f"  step {step:>3}: right with probability {told} ({seconds:.0f} s, at most {left:.0f} s to go)")

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
