"""``FailureBoundary`` contains the failures of a recorder, ``OptionalFeature`` those of one diagnostic feature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from .collectives import Collectives, OtherRankFailedError, is_main_process

logger = logging.getLogger(__name__)
T = TypeVar("T")


def describe_error(error: Exception) -> str:
    """Returns the error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class FailureBoundary:
    """Keeps an error of this rank until the next collective work, in which all ranks learn of it.

    Attributes:
        reason: the first error of this rank, or that another rank failed; None: nothing failed.

    Args:
        on_error: called at each error outside of collective work.
        device: returns where this rank's collectives run.
    """

    def __init__(self, on_error: Callable[[], None], device: Callable[[], torch.device]) -> None:
        self.reason: str | None = None
        self._on_error, self._device = on_error, device
        self._collectives: Collectives | None = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keeps an error of this context."""
        try:
            yield
        except Exception as error:
            self.add(error)

    def add(self, error: Exception) -> None:
        """Keeps an error, unless there is an earlier one."""
        self.reason = self.reason or describe_error(error)
        self._on_error()

    @property
    def collectives(self) -> Collectives:
        """The ranks' collectives, from when they are first needed: engines set up their process group late."""
        if self._collectives is None:
            self._collectives = Collectives(self._device())
        return self._collectives

    def together(self, work: Callable[[], T]) -> T:
        """Returns the result of ``work``, if it succeeds on all ranks; else every rank raises an error."""
        return self.collectives.attempt(work)

    def attempt(self, work: Callable[[Collectives], T]) -> T | None:
        """Runs collective work; returns None if it failed on any rank, or if a rank has failed before."""

        def checked_work() -> T:
            if self.reason is not None:
                raise RuntimeError(self.reason)
            return work(self.collectives)

        try:
            return self.together(checked_work)
        except OtherRankFailedError as error:
            self.reason = self.reason or str(error)
        except Exception as error:
            self.reason = self.reason or describe_error(error)
        return None


class LogOnce:
    """Logs each warning once, on the main process."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._said and is_main_process():
            logger.warning(text)
        self._said.add(text)


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
