"""Compares variants over seeds: paired differences with intervals, Holm's correction, and how many seeds would tell.

Runs of one seed share prompts and evaluation questions, so differences are paired by seed. A 95 % t-interval over seeds
covers the seeds' noise. The learning rates were chosen on a few tuning seeds, which adds an error that the seeds don't
show: intervals are widened by it (``rates.Choice.error``), or by 1.4 where too few tuning seeds measure it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trl_ext.report.evidence import student

from .rates import WITHOUT_BOOTSTRAP, Choice, worst_value
from .study import Curve, Result, Run, read_curve

FEWEST_SEEDS = 3
PLACEBO = " (placebo)"  # ends the name of the first variant's second sweep
RESOLUTION = 0.01  # the difference for which the needed seeds are counted
NEVER = 10**9  # seeds


@dataclass(frozen=True)
class Reached:
    """Median, least and most of a cost to reach the target over the seeds; inf where a run never reached it."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Summary:
    """One variant over its seeds.

    Attributes:
        final: the metric at the end of each seed's run; failed: how many runs failed or ended as NaN.
        steps, tokens, seconds: to the target; reached: how many runs reached it.
    """

    name: str
    choice: Choice
    final: dict[int, float]
    curves: dict[int, Curve]
    failed: int
    reached: int
    steps: Reached
    tokens: Reached
    seconds: Reached

    @property
    def mean(self) -> float:
        return statistics.fmean(self.final.values())


@dataclass(frozen=True)
class Difference:
    """A variant less the first one, paired by seed.

    Attributes:
        low, high: 95 % interval, widened by the choice of both rates; infinite below three seeds.
        told: whether it excludes 0 after Holm's correction over all compared variants.
        more_seeds: fewest and most further seeds that would tell ``RESOLUTION``; None below three seeds.
        widened: by the bootstrap over tuning seeds, by 1.4, or not at all (one rate).
    """

    name: str
    difference: float
    low: float
    high: float
    told: bool
    more_seeds: tuple[int, int] | None
    widened: str


def target_of(first: Sequence[Curve]) -> float:
    """Returns nine tenths of the way from the first variant's mean first value to its mean last one."""
    pairs = [(curve.values[0], curve.values[-1]) for curve in first if curve.values]
    begin, end = (statistics.fmean(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return begin + 0.9 * (end - begin)


def summarize(
    runs: Mapping[str, Sequence[tuple[Run, Result]]], choices: Mapping[str, Choice], metric: str, target: float | None
) -> tuple[list[Summary], float]:
    """Returns each variant's summary, in order, and the target. Failed runs count as the lowest value of any run."""
    curves = {
        name: {run.seed: read_curve(result.logs, metric) for run, result in pairs} for name, pairs in runs.items()
    }
    worst = worst_value([curve.values for by_seed in curves.values() for curve in by_seed.values()])
    if target is None:
        target = target_of(list(next(iter(curves.values())).values()))
    found = []
    for name, pairs in runs.items():
        bad = {
            run.seed
            for run, result in pairs
            if result.status != "finished" or not curves[name][run.seed].values
            or not math.isfinite(curves[name][run.seed].values[-1])
        }  # fmt: skip
        final = {seed: worst if seed in bad else curve.values[-1] for seed, curve in curves[name].items()}
        costs = [cost_to(curve, target) for curve in curves[name].values()]
        columns = [_reached([cost[i] for cost in costs]) for i in range(3)]
        reached = sum(cost[0] < math.inf for cost in costs)
        found.append(Summary(name, choices[name], final, curves[name], len(bad), reached, *columns))
    return found, target


def cost_to(curve: Curve, target: float) -> tuple[float, float, float]:
    """Returns steps, tokens and seconds until the curve first reaches the target; inf: never."""
    at = curve.first_at(target)
    if at is None:
        return math.inf, math.inf, math.inf
    return float(curve.steps[at]), curve.tokens[at], curve.seconds[at]


def _reached(costs: Sequence[float]) -> Reached:
    return Reached(statistics.median(costs), min(costs), max(costs)) if costs else Reached(*[math.inf] * 3)


def differences(summaries: Sequence[Summary]) -> list[Difference]:
    """Compares every other variant with the first one."""
    first, *others = summaries
    plain = [_difference(one, first) for one in others]
    errors = [_standard_error(one, first)[0] for one in others]
    asked = [i for i, one in enumerate(others) if not one.name.endswith(PLACEBO)]  # nobody asks about the placebo
    told = holm([(plain[i].difference, errors[i]) for i in asked], len(first.final))
    return [replace(one, told=i in asked and told[asked.index(i)]) for i, one in enumerate(plain)]


def _paired(one: Summary, first: Summary) -> list[float]:
    return [one.final[seed] - first.final[seed] for seed in sorted(first.final.keys() & one.final.keys())]


def _standard_error(one: Summary, first: Summary) -> tuple[float, str]:
    """Returns the widened standard error of the mean difference, and by what it is widened."""
    values = _paired(one, first)
    if len(values) < 2:
        return math.inf, ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    errors = [one.choice.error, first.choice.error]
    if None in errors:
        return WITHOUT_BOOTSTRAP * error, "1.4"
    added = math.hypot(*(float(value or 0.0) for value in errors))
    return math.hypot(error, added), "bootstrap" if added else ""


def _difference(one: Summary, first: Summary) -> Difference:
    values = _paired(one, first)
    mean = statistics.fmean(values)
    error, widened = _standard_error(one, first)
    if len(values) < FEWEST_SEEDS:
        return Difference(one.name, mean, -math.inf, math.inf, False, None, widened)
    half = student(len(values) - 1, 0.025) * error
    added = 0.0 if widened == "1.4" else math.hypot(one.choice.error or 0.0, first.choice.error or 0.0)
    return Difference(one.name, mean, mean - half, mean + half, False, more_seeds(values, widened, added), widened)


def holm(found: Sequence[tuple[float, float]], seeds: int) -> list[bool]:
    """Returns which differences, given with their errors, exclude 0 after Holm's correction.

    The largest t is compared with that of 5 % / m, the next one with that of 5 % / (m - 1), until one is smaller.
    """
    told = [False] * len(found)
    if seeds < FEWEST_SEEDS:
        return told
    sizes = [abs(value) / error if error else math.inf * bool(value) for value, error in found]
    sizes = [0.0 if math.isnan(size) else size for size in sizes]
    for rank, i in enumerate(sorted(range(len(found)), key=lambda i: -sizes[i])):
        if sizes[i] <= student(seeds - 1, 0.025 / (len(found) - rank)):
            break
        told[i] = True
    return told


def more_seeds(values: Sequence[float], widened: str, added: float = 0.0) -> tuple[int, int]:
    """Returns how many more seeds would give an interval of +- ``RESOLUTION``, from an 80 % interval of the spread.

    An 80 % interval of the spread comes from the chi-squared distribution (Wilson and Hilferty's approximation).
    ``added``, the error of the rates' choice, doesn't shrink with the number of seeds: if it is half of the resolution
    or more, no number is enough, and ``NEVER`` is returned.
    """
    degrees = len(values) - 1
    spread = statistics.stdev(values) * (WITHOUT_BOOTSTRAP if widened == "1.4" else 1.0)
    bounds = []
    for quantile in (0.9, 0.1):
        z = statistics.NormalDist().inv_cdf(quantile)
        chi_squared = degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
        bounds.append(seeds_needed(spread * math.sqrt(degrees / max(chi_squared, 1e-3)), added))
    low, high = (NEVER if needed == NEVER else max(0, needed - len(values)) for needed in bounds)
    return low, high


def seeds_needed(spread: float, added: float) -> int:
    """Returns the fewest seeds n with ``t_(n-1) sqrt(spread^2 / n + added^2)`` at most ``RESOLUTION``."""
    for n in range(FEWEST_SEEDS, 31):
        if student(n - 1, 0.025) * math.hypot(spread / math.sqrt(n), added) <= RESOLUTION:
            return n
    left = (RESOLUTION / 2) ** 2 - added**2  # t is about 2 from here on
    return max(31, math.ceil(spread**2 / left)) if left > 0 else NEVER
