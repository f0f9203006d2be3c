"""Logs each message of a run at most once: a fallback, or an option that has no effect."""

from __future__ import annotations

from typing import Any


class LogOnce:
    """Logs each text at most once, at the given level."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._logged: set[str] = set()

    def __call__(self, text: str, level: str = "warning") -> None:
        if text not in self._logged:
            self._logged.add(text)
            getattr(self._logger, level)(text)
