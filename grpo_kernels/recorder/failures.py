"""``OptionalFeature`` contains the failures of one diagnostic feature."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from .collectives import is_main_process

logger = logging.getLogger(__name__)
T = TypeVar("T")


def describe_error(error: Exception) -> str:
    """Returns the error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class OptionalFeature:
    """Runs one diagnostic feature. If it fails, it is switched off and a warning is logged; the others continue.

    ``warning`` starts that message and says what will be missing: "Interference is logged without its files".
    """

    def __init__(self, warning: str, *, on: bool = True) -> None:
        self._warning, self.on = warning, on

    def switch_off(self, reason: str) -> None:
        """Switches the feature off, and logs why."""
        if self.on and is_main_process():
            logger.warning(f"{self._warning} from here on: {reason}.")
        self.on = False

    def run(self, work: Callable[[], T], otherwise: T) -> T:
        """Returns the result of ``work``, or ``otherwise`` if the feature is off or fails."""
        if not self.on:
            return otherwise
        try:
            return work()
        except Exception as error:
            self.switch_off(describe_error(error))
            return otherwise
