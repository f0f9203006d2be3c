"""What a run says of itself, once: a fallback, a refusal, a default that isn't honoured."""

from __future__ import annotations

from typing import Any


class SayOnce:
    """Logs each text at most once, at the level named."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._said: set[str] = set()

    def __call__(self, text: str, level: str = "warning") -> None:
        if text not in self._said:
            self._said.add(text)
            getattr(self._logger, level)(text)
