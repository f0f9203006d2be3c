"""Predicts from the theorem's constant C and the group size how much division by the std gains over ``mean``.

C is 8/3 of the mean, over prompts and steps, of the population std of a group's rewards (arXiv 2601.23135, Theorem
3.2). On a log-linear policy, with the best learning rate for each method (``examples/paper/lab.py``), the gain of
``std`` over ``mean`` falls with C, as the theorem predicts, and grows with the group size G. The theorem divides by the
true sigma, but a trainer divides by an estimate from G answers; in a live group of 8 rewards of 0 or 1 that estimate is
between 0.35 and 0.53 for every prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import log2

# Measured gain in accuracy (mean over training) by group size, and by ranges of the C of the first batches, given by
# their middles. The source is examples/paper/results/lab.csv; examples/paper/test_lab.py compares them.
GROUPS = (4, 8, 32, 128)
CONSTANTS = (0.5, 0.8, 1.0, 1.2)
GAIN_GC = (
    (0.002, 0.003, 0.000, 0.000),
    (0.008, 0.000, -0.001, 0.002),
    (0.039, 0.024, 0.009, 0.005),
    (0.060, 0.035, 0.013, 0.004),
)
SURE, NEVER = 0.9, 1.1  # limits of C: below SURE use ``std``, above NEVER ``mean``, which is as good there
WORTH_A_WORD = 0.01  # a smaller gain in accuracy isn't worth reporting: another learning rate has the same effect


def std_exponent(constant: float) -> float:
    """Returns the exponent alpha of ``power`` for C: 1 (``std``) up to 0.9, 0 (``mean``) from 1.1, linear in between.

    The theorem's limit is 1. With few answers per prompt C is underestimated: it is at most 0.67 with 2 answers, 1.08
    with 4 and 1.24 with 8, for every task. Raises ``ValueError`` for a negative number or NaN.
    """
    if not constant >= 0:
        raise ValueError(f"constant={constant!r} must be a number that is not negative")
    return min(1.0, max(0.0, (NEVER - constant) / (NEVER - SURE)))


def std_gain(constant: float, group: int) -> float:
    """Predicts the gain in accuracy (mean over training) of ``std`` over ``mean`` for a log-linear policy.

    It interpolates ``GAIN_GC`` linearly, and is constant outside.

    Args:
        constant: C of the first batches.
        group: G.
    """
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
