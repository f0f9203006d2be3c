"""Chooses each variant's learning rate from a sweep on tuning seeds, and measures how much that choice is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .study import Result, Run, read_curve

DRAWS = 1000
FEWEST_FOR_BOOTSTRAP = 3
WITHOUT_BOOTSTRAP = 1.4  # widens intervals: the RMS z of 13 cells of the lab whose rates were tuned anew

Scores = Mapping[float, Mapping[int, float]]  # learning rate -> tuning seed -> score


@dataclass(frozen=True)
class Choice:
    """A variant's learning rate.

    Attributes:
        rate: the best one; at_edge: whether a rate outside of the sweep may be better.
        error: the standard error that choosing on these tuning seeds adds to the variant's score; None: unknown.
        centre: where the sweep came from.
    """

    rate: float
    at_edge: bool
    error: float | None
    centre: str


def worst_value(curves: Sequence[Sequence[float]]) -> float:
    """Returns the lowest finite value of all curves; 0 without any. A failed run counts as it."""
    values = [value for curve in curves for value in curve if math.isfinite(value)]
    return min(values, default=0.0)


def sweep_scores(
    results: Sequence[tuple[Run, Result]], metric: str, at_end: bool = False
) -> dict[float, dict[int, float]]:
    """Returns the mean of the metric over training by rate and seed; a failed or NaN run's is the lowest value seen.

    ``at_end``: the last value instead, which the comparison is about.
    """
    curves = {id(run): read_curve(result.logs, metric) for run, result in results}
    worst = worst_value([curve.values for curve in curves.values()])
    scores: dict[float, dict[int, float]] = {}
    for run, result in results:
        curve = curves[id(run)]
        score = curve.last if at_end else curve.mean_over_training
        usable = result.status == "finished" and math.isfinite(score)
        scores.setdefault(run.learning_rate, {})[run.seed] = score if usable else worst
    return scores


def best_rate(scores: Scores, seeds: Sequence[int]) -> float:
    """Returns the rate of the highest mean score; of equals the smaller."""
    return max(sorted(scores), key=lambda rate: statistics.fmean(scores[rate][seed] for seed in seeds))


def choose_rate(scores: Scores, finals: Scores, centre: str) -> Choice:
    """Chooses the best rate. With three tuning seeds or more a bootstrap over them measures the choice's error.

    Each draw of tuning seeds chooses a rate by its score. The spread of those rates' last values, each a mean over all
    tuning seeds, is what the choice adds to the error of the comparison, which is of last values too.
    """
    seeds = sorted(next(iter(scores.values())))
    rate = best_rate(scores, seeds)
    at_edge = len(scores) > 1 and rate in (min(scores), max(scores))
    if len(scores) == 1:
        return Choice(rate, False, 0.0, centre)
    if len(seeds) < FEWEST_FOR_BOOTSTRAP:
        return Choice(rate, at_edge, None, centre)
    means = {one: statistics.fmean(by_seed.values()) for one, by_seed in finals.items()}
    drawn = np.random.default_rng(0).choice(seeds, (DRAWS, len(seeds)))
    chosen = [means[best_rate(scores, row)] for row in drawn.tolist()]
    return Choice(rate, at_edge, math.sqrt(statistics.fmean((one - means[rate]) ** 2 for one in chosen)), centre)


def beyond(scores: Scores, choice: Choice) -> float:
    """Returns the next rate outwards from a best one at the sweep's edge, a step of the sweep further."""
    rates = sorted(scores)
    step = rates[-1] / rates[-2] if choice.rate == rates[-1] else rates[0] / rates[1]
    return float(f"{choice.rate * step:.3g}")


def grid(centre: float, factors: Sequence[float]) -> list[float]:
    """Returns the rates around a centre, with three significant digits."""
    return sorted(float(f"{centre * factor:.3g}") for factor in factors)


def predicts_rates(config: Mapping[str, object]) -> bool:
    """Returns whether the what-if predictor of rates applies: plain SGD, one use of each batch, no KL, no clipping."""
    optimizer = str(config.get("optim"))
    per_step = int(str(config.get("gradient_accumulation_steps") or 1))
    on_policy = config.get("num_iterations") == 1 and config.get("steps_per_generation") == per_step
    unclipped = not config.get("max_grad_norm")
    return (
        optimizer == "sgd"
        and on_policy
        and not config.get("beta")
        and unclipped
        and bool(config.get("interference_every"))
    )


def predicted_factors(folders: Sequence[Path], names: Mapping[str, str], first: str) -> dict[str, float]:
    """Predicts each variant's best rate over the first one's, by the interference that the first one's runs logged.

    Args:
        folders: those runs' folders.
        names: variant -> normalisation, of variants that are a normalisation without options.

    Returns:
        Variant -> factor, geometric means over runs; without variants that the logs can't predict.
    """
    from trl_ext.report.read_run import read_run
    from trl_ext.report.what_if_table import what_if_table

    logs: dict[str, list[float]] = {}
    for folder in folders:
        try:
            methods = what_if_table(read_run(folder)).methods
        except ValueError:
            continue
        own = methods.get(names.get(first, ""))
        for variant, name in names.items():
            other = methods.get(name)
            if own is not None and own.rate is not None and other is not None and other.rate is not None:
                if own.rate.value > 0 and other.rate.value > 0:
                    logs.setdefault(variant, []).append(math.log(other.rate.value / own.rate.value))
    return {variant: math.exp(statistics.fmean(values)) for variant, values in logs.items()}
