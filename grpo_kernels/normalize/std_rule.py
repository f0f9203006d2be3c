"""Whether dividing by the std is more than a learning rate: by the theorem's constant C, and how much by the group.

C = 8/3 of the mean, over prompts and steps, of the population std of a group's rewards (arXiv 2601.23135, Theorem 3.2).
On a log-linear policy, each method at its own best learning rate (``examples/paper/lab.py`` and its ``README.md``), the
gain of ``std`` over ``mean`` falls with C, as the theorem has it, and grows with the group: the theorem divides by the
true sigma, a trainer by an estimate from G answers, which of a live group of 8 rewards of 0 or 1 lies between 0.35 and
0.53 whatever the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import log2

# Gain in accuracy, a mean over training: measured at these group sizes, in ranges of the C that the first batches show
# with these middles. examples/paper/results/lab.csv is what it comes from; examples/paper/test_lab.py compares.
GROUPS = (4, 8, 32, 128)
CONSTANTS = (0.5, 0.8, 1.0, 1.2)
GAIN_GC = (
    (0.002, 0.003, 0.000, 0.000),
    (0.008, 0.000, -0.001, 0.002),
    (0.039, 0.024, 0.009, 0.005),
    (0.060, 0.035, 0.013, 0.004),
)
SURE, NEVER = 0.9, 1.1  # of C: up to the first ``std``, from the second ``mean``, which is as good there
WORTH_A_WORD = 0.01  # of accuracy: below, a learning rate does the same


def std_exponent(constant: float) -> float:
    """alpha of ``power`` that C calls for: 1 (``std``) up to 0.9, 0 (``mean``) from 1.1, straight between.

    The border is the theorem's 1. Logged with few answers C reads low: with 4 it is at most 1.08, with 8 1.24, with 2
    0.67, whatever the task. ``ValueError`` for what isn't a number of 0 or more.
    """
    if not constant >= 0:
        raise ValueError(f"constant={constant!r} must be a number that is not negative")
    return min(1.0, max(0.0, (NEVER - constant) / (NEVER - SURE)))


def std_gain(constant: float, group: int) -> float:
    """Predicted gain of ``std`` over ``mean`` in accuracy, a mean over training, of a log-linear policy whose log shows
    this C in its first batches, with ``group`` answers to a prompt: the map's table, straight between its places and
    constant outside."""
    if group < 2 or not constant >= 0:
        raise ValueError(f"group={group!r} must be at least 2, constant={constant!r} a number that is not negative")
    by_group = [_between(CONSTANTS, gains, constant) for gains in GAIN_GC]
    return _between([log2(size) for size in GROUPS], by_group, log2(group))


def _between(places: Sequence[float], values: Sequence[float], at: float) -> float:
    i = bisect_right(places, at)
    if i in (0, len(places)):
        return values[max(0, i - 1)]
    share = (at - places[i - 1]) / (places[i] - places[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])
