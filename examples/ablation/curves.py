"""The curves of an ablation's runs, and what is read from one method's: steps to a target, its best learning rate.

Intervals are 95% t-intervals over seeds.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# groups of the trainer's log, and what of them is a column of results.csv; interference only of the steps that log it
GROUPS = {
    "curvature": "sigma_mean speedup_constant directional_corr",
    "normalization": "scale_mean zero_variance_frac alpha",
    "interference": (
        "orthogonality near_orthogonal_frac conflict_frac live_prompts cos_abs_mean cos_mean cos_std "
        "alignment alignment_low alignment_high"
    ),
    "theory": "m_bound_p95 negative_pairs_frac r1 r2",
}
# column of results.csv -> key of the trainer's log
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
# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom; with more, the last one (wider by less than 5%)
# fmt: off
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
             2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
             2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
# fmt: on

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


def best_learning_rate(runs: Sequence[Run]) -> float:
    """The rate of the highest ``mean_over_training``, averaged over seeds; of equals the smaller. One method's runs.

    Only rates that have all the seeds are compared: a rate whose hard seed failed would look too good.
    """
    scores: dict[float, list[float]] = {}
    for run in runs:
        scores.setdefault(run.learning_rate, []).append(mean_over_training(*run.curve("held_out_accuracy")))
    most = max(map(len, scores.values()))
    return max(sorted(rate for rate in scores if len(scores[rate]) == most), key=lambda rate: sum(scores[rate]))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval; for a paired difference give the differences."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = STUDENT_T[min(len(values) - 1, len(STUDENT_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def block_means(curve: Mapping[float, float], width: int) -> dict[float, float]:
    """Means over steps 1 to ``width``, and so on, at the middles: the reward of a single step is noisy."""
    blocks: dict[int, list[float]] = {}
    for step, value in curve.items():
        blocks.setdefault(math.ceil(step / width), []).append(value)
    return {(block - 0.5) * width + 0.5: statistics.fmean(values) for block, values in blocks.items()}


def mean_curve(curves: Sequence[Mapping[float, float]], in_all: bool = False) -> dict[float, Interval]:
    """By step, the mean with its interval over the curves that have it; ``in_all``: of the steps that all have."""
    steps = set.intersection(*map(set, curves)) if in_all else {step for curve in curves for step in curve}
    return {step: mean_interval([curve[step] for curve in curves if step in curve]) for step in sorted(steps)}
