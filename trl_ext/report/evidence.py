"""Statistics behind the verdicts: since which step something holds, and how sure that is.

One bad number is an accident; a *state* is what holds in most logged numbers from its onset to the end of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST, MOSTLY = 3, 0.8  # logged numbers that make a state, and the share of those since its onset that have it


@dataclass(frozen=True)
class State:
    """What holds since step ``onset``: in ``count`` of ``of`` logged numbers, with their mean and maximum."""

    onset: int
    count: int
    of: int
    mean: float
    largest: float

    @property
    def confidence(self) -> float:
        """The probability that the next number has it too, by Laplace's rule of succession."""
        return (self.count + 1) / (self.of + 2)


def state(
    steps: Sequence[int], values: Sequence[float], bad: Callable[[float], bool], *, least: int = LEAST
) -> State | None:
    """The longest state that goes on to the end, or None."""
    onset, count, total = None, 0, 0
    for length, first in enumerate(reversed(range(len(values))), start=1):
        is_bad = bad(values[first])
        count += is_bad
        if is_bad and count >= max(least, MOSTLY * length):
            onset, total = first, count
    if onset is None:
        return None
    since = values[onset:]
    return State(steps[onset], total, len(since), float(np.mean(since)), max(since))


def above(border: float) -> Callable[[float], bool]:
    """At the border or above it."""
    return lambda value: value >= border


def ends(values: Sequence[float], share: float = 0.1) -> tuple[float, float]:
    """Means of the first and the last tenth, at least one number each."""
    count = max(1, round(share * len(values)))
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


def student(degrees: int, tail: float) -> float:
    """Returns the quantile of Student's t that leaves ``tail`` above it.

    Exact (Abramowitz and Stegun 26.7.3 and 26.7.4, by bisection): with a few seeds and Holm's small tails expansions
    are 2 to 9 % short.
    """

    def above(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term = total = math.cos(angle) if odd and degrees > 1 else 0.0 if odd else 1.0
        for k in range(3 if odd else 2, degrees - 1, 2):
            term *= math.cos(angle) ** 2 * (k - 1) / k
            total += term
        within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
        return (1 - within) / 2

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > tail else (low, middle)
    return low


def interval(values: Sequence[float], looks: int = 1) -> tuple[float, float, float]:
    """Mean and its 95 % t-interval over steps; infinitely wide below three. ``looks``: how many intervals must hold at
    once (Bonferroni)."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, -math.inf, math.inf
    half = student(len(values) - 1, 0.025 / looks) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def largest_fall(values: Sequence[float], width: int = 5, draws: int = 200) -> tuple[int, float, float]:
    """Compares how far smoothed values fell, from the highest to the last, with how far noise alone falls.

    The noise is resampled: flat runs made of blocks of the values' residuals from a running median. Blocks keep the
    correlation of neighbours.

    Returns:
        Where the highest mean of ``width`` begins; the fall from it to the last mean; that fall less the mean fall of
        noise, in its standard deviations. In flat runs of 60 and 300 logged values, looked at as the watch does, the
        last is above 8 at some time, with half of the range lost, in 0 of 150 runs of independent values, in 2 and 5 %
        where neighbours correlate by 0.3, and in 11 % where they correlate by 0.6.
    """
    numbers = np.asarray(values, dtype=float)
    n, near = len(numbers), 2 * max(width, len(numbers) // 8) + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(numbers, near // 2, mode="edge"), near)
    local = np.median(windows, axis=1)
    residuals = (numbers - local) / math.sqrt(1 - 1 / near)
    block = round(math.sqrt(n)) + 1
    starts = np.random.default_rng(0).integers(0, n - block + 1, (draws, -(-n // block)))
    noise = (residuals - residuals.mean())[starts[:, :, None] + np.arange(block)].reshape(draws, -1)[:, :n]

    def means(rows: np.ndarray) -> np.ndarray:
        sums = np.cumsum(np.pad(rows, ((0, 0), (1, 0))), axis=1)
        return (sums[:, width:] - sums[:, :-width]) / width

    smooth, flat = means(numbers[None])[0], means(noise)
    falls = flat.max(1) - flat[:, -1]
    best = int(np.flatnonzero(smooth >= smooth.max() - 1e-9)[-1])  # the last of equals
    fall = float(smooth[best] - smooth[-1])
    spread = float(falls.std())
    return best, fall, (fall - float(falls.mean())) / spread if spread else math.inf if fall > 0 else 0.0


def block_means(steps: Sequence[int], values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """At most ``most`` means of neighbouring values, each at its last step; the values themselves if they are fewer."""
    size = -(-len(values) // most)
    if size <= 1:
        return list(steps), list(values)
    blocks = range(len(values) % size, len(values), size)  # the first values are left out if they fill no block
    return [steps[i + size - 1] for i in blocks], [float(np.mean(values[i : i + size])) for i in blocks]


def noise(values: Sequence[float]) -> float:
    """Standard deviation of single values about a trend; 0 below three values.

    From second differences, in which a steady trend cancels: with independent noise their variance is six times its.
    """
    return math.sqrt(float(np.mean(np.diff(values, 2) ** 2)) / 6) if len(values) > 2 else 0.0


def sampling_error(questions: float, accuracies: Sequence[float]) -> float:
    """Standard error of the difference of two accuracies, or of one, by the number of questions; 0 if that is unknown.

    Several answers to a question, and the same questions both times, make the true error smaller. A right and a wrong
    answer are added (Agresti and Coull), so that an accuracy of 0 or 1 has an error too.
    """
    if questions < 1:
        return 0.0
    smoothed = [(value * questions + 1) / (questions + 2) for value in accuracies if 0 <= value <= 1]
    return math.sqrt(sum(value * (1 - value) / (questions + 2) for value in smoothed))


def trailing(steps: Sequence[int], values: Sequence[float], width: int) -> tuple[list[int], list[float]]:
    """Means of ``width`` numbers, each at the step where it begins."""
    if width <= 1:
        return list(steps), list(values)
    if len(values) < width:
        return [], []
    means = np.convolve(values, np.ones(width), mode="valid") / width
    return list(steps[: len(means)]), means.tolist()
