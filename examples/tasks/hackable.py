"""A reward that can be had without being right: for the docs' sample of a run that learns the wrong thing."""

from __future__ import annotations

from typing import Any

from .correctness import SameText

_right = SameText()


def long_answers(completions: list, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Pays for length alone, up to 24 tokens; logs ``accuracy``, which it doesn't pay for."""
    _right(completions, **columns)
    return [min(len(ids) / 24, 1.0) for ids in completion_ids]
