"""Since when is something so, and how sure is that: what the signatures of ``signatures.py`` are made of.

A signature looks at numbers as they were logged. One bad number is an accident; a *state* is what holds in most of
the numbers from its onset to the end of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST, MOSTLY = 3, 0.8  # logged numbers that make a state, and the share of those since its onset that have it
NORMAL = 1.96  # standard errors of a 95 % interval


@dataclass(frozen=True)
class State:
    """What holds since ``onset``, a step: in ``count`` of ``of`` logged numbers. ``worst`` of them, and their mean."""

    onset: int
    count: int
    of: int
    mean: float
    worst: float

    @property
    def confidence(self) -> float:
        """That the next number has it too, by Laplace's rule of succession."""
        return (self.count + 1) / (self.of + 2)


def state(
    steps: Sequence[int],
    values: Sequence[float],
    bad: Callable[[float], bool],
    *,
    least: int = LEAST,
    low: bool = False,
) -> State | None:
    """The longest state that goes on to the end, or None. ``low``: the worst is the smallest."""
    flags = [bad(value) for value in values]
    onset, count, of = None, 0, 0
    for back, first in enumerate(reversed(range(len(flags))), start=1):
        count += flags[first]
        if flags[first] and count >= max(least, MOSTLY * back):
            onset, of = first, count
    if onset is None:
        return None
    chosen = [value for value, flag in zip(values[onset:], flags[onset:], strict=True) if flag]
    worst = min(chosen) if low else max(chosen)
    return State(steps[onset], of, len(flags) - onset, float(np.mean(chosen)), worst)


def above(border: float) -> Callable[[float], bool]:
    """At the border or beyond it."""
    return lambda value: value >= border


def ends(values: Sequence[float], share: float = 0.1) -> tuple[float, float]:
    """Means of the first and the last tenth, at least one number each."""
    count = max(1, round(share * len(values)))
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval over steps; infinitely wide for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = NORMAL * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half
