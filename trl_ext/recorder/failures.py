"""``OptionalPart``: a part of the diagnostics that fails alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.logging import get_logger

logger = get_logger(__name__)
T = TypeVar("T")


def described(error: Exception) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class OptionalPart:
    """Runs a part of the diagnostics, and switches it off where it fails, which is logged once; the rest goes on.

    ``warning``: what is missing then, as in "Interference is logged without its files".
    """

    def __init__(self, warning: str, *, on: bool = True) -> None:
        self._warning, self.on = warning, on

    def switch_off(self, reason: str) -> None:
        """Logs why this part is missing from here on."""
        if self.on:
            logger.warning(f"{self._warning} from here on: {reason}.")
        self.on = False

    def run(self, work: Callable[[], T], otherwise: T) -> T:
        """Returns what ``work`` returns, or ``otherwise`` where the part is off or fails."""
        if not self.on:
            return otherwise
        try:
            return work()
        except Exception as error:
            self.switch_off(described(error))
            return otherwise
