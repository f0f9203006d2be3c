"""The runs of a study, read from its ``results.csv``, and what is read from their curves.

Intervals are 95% t-intervals over seeds.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t

# groups of the trainer's log, and what of them is a column of a run; interference only of the steps that log it
GROUPS = {
    "curvature": "sigma_mean speedup_constant directional_corr",
    "normalization": "scale_mean zero_variance_frac alpha",
    "interference": (
        "orthogonality near_orthogonal_frac conflict_frac live_prompts cos_abs_mean cos_mean cos_std "
        "alignment alignment_low alignment_high"
    ),
    "theory": "m_bound_p95 negative_pairs_frac r1 r2",
}
# column of a run -> key of the trainer's log
LOGGED = {
    **{"reward": "reward", "held_out_accuracy": "eval_accuracy", "grad_norm": "grad_norm", "entropy": "entropy"},
    **{name: f"{group}/{name}" for group, names in GROUPS.items() for name in names.split()},
    "training_phase": "phase",
}
# the same for each task: "held_out/sums", "heard/sums", "cos/sums/puzzles"
LOGGED_BY_TASK = {
    r"eval_tasks/(.+)/reward": r"held_out/\1",
    r"tasks/(.+)/reward": r"reward/\1",
    r"tasks/(.+)/heard": r"heard/\1",
    r"tasks/(.+)/cos/(.+)": r"cos/\1/\2",
}
NAMED = ("part", "method", "learning_rate", "seed")  # columns of results.csv that say which run a row is of
Row = dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """One training run; ``rows`` as ``tidy_rows`` makes them."""

    method: str
    learning_rate: float
    seed: int
    rows: list[Row]

    def curve(self, column: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column, where it was logged."""
        points = [(row["step"], row[column]) for row in self.rows if row.get(column) is not None]
        return [float(step) for step, _ in points], [float(value) for _, value in points]  # type: ignore[arg-type]

    def by_step(self, column: str) -> dict[float, float]:
        return dict(zip(*self.curve(column), strict=True))


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval; NaN bounds where one seed can't give any."""

    estimate: float
    low: float
    high: float

    def __format__(self, layout: str) -> str:
        ends = "" if math.isnan(self.low) else f" [{self.low:{layout}}, {self.high:{layout}}]"
        return f"{self.estimate:{layout}}{ends}"


def tidy_rows(log_history: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A trainer's ``log_history`` as one row a step, columns ``step`` and those of ``LOGGED``; None: not logged.
    Those of ``LOGGED_BY_TASK`` only where they were.

    ``held_out_accuracy`` at step t is the policy's after t updates. The others at step t are of the t-th batch, which
    the policy sampled after t - 1 updates.
    """
    rows: dict[int, Row] = {}
    for log in log_history:
        found = {column: float(log[key]) for column, key in LOGGED.items() if key in log}
        for key in log:
            for pattern, column in LOGGED_BY_TASK.items():
                if match := re.fullmatch(pattern, key):
                    found[match.expand(column)] = float(log[key])
        if found:
            rows.setdefault(log["step"], {"step": log["step"], **dict.fromkeys(LOGGED)}).update(found)
    return [rows[step] for step in sorted(rows)]


def read_runs(study: Path | str) -> tuple[list[Run], dict[str, list[Run]]]:
    """Returns the finished runs of a study's ``results.csv``: those of the sweep, and those compared, by method."""
    with open(Path(study) / "results.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["status"] == "finished"]
    logs: dict[tuple[str, str, str, str], list[dict[str, float]]] = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if value and key not in (*NAMED, "status")}
        logs.setdefault((row["part"], row["method"], row["learning_rate"], row["seed"]), []).append(numbers)
    sweep: list[Run] = []
    finals: dict[str, list[Run]] = {}
    for (part, method, rate, seed), lines in logs.items():
        own = sweep if part == "sweep" else finals.setdefault(method, [])
        own.append(Run(method, float(rate), int(seed), tidy_rows(lines)))
    return sweep, finals


def steps_to_target(steps: Sequence[float], accuracies: Sequence[float], target: float) -> float:
    """The step at which the accuracy, a straight line between evaluations, first reaches the target; inf: never."""
    for i, accuracy in enumerate(accuracies):
        if accuracy >= target:
            if i == 0:
                return steps[0]
            share = (target - accuracies[i - 1]) / (accuracy - accuracies[i - 1])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return math.inf


def mean_over_training(steps: Sequence[float], accuracies: Sequence[float]) -> float:
    """Area under the curve of straight lines between evaluations, divided by the number of steps.

    The score by which learning rates are compared: learning early and ending high both count, and it is less noisy
    than any single evaluation.
    """
    pairs = zip(steps, steps[1:], accuracies, accuracies[1:], strict=False)
    return sum((b - a) * (y + z) / 2 for a, b, y, z in pairs) / (steps[-1] - steps[0])


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval; for a paired difference give the differences."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    quantile = round(float(t.ppf(0.975, len(values) - 1)), 3)  # as printed tables have it, by which pages were made
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def mean_curve(curves: Sequence[Mapping[float, float]], in_all: bool = False) -> dict[float, Interval]:
    """By step, the mean with its interval over the curves that have it; ``in_all``: of the steps that all have."""
    steps = set.intersection(*map(set, curves)) if in_all else {step for curve in curves for step in curve}
    return {step: mean_interval([curve[step] for curve in curves if step in curve]) for step in sorted(steps)}
