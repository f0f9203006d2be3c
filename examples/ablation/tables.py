"""Compares the methods of an ablation: tables for a CSV and, in Markdown, for people.

Intervals are 95% intervals over seeds: t-intervals for means and for paired differences, a bootstrap over seeds for
ratios of medians and of learning rates.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .curves import Interval, Run, mean_interval, mean_over_training, steps_to_target

RESAMPLES = 10_000
REFERENCE = "std"  # what differences are taken to
BASELINE = "mean"  # what speed-ups are measured over


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of named values; a column that only some rows have is empty in the others."""
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def interpolated_rate(scores: Mapping[float, float]) -> float:
    """Learning rate -> score: the vertex of the parabola, in the rate's logarithm, through the best and its two
    neighbours; the best itself where it is at an edge, or no parabola has a highest point there."""
    rates = sorted(scores)
    best = max(range(len(rates)), key=lambda i: scores[rates[i]])
    if best in (0, len(rates) - 1):
        return rates[best]
    x = np.log(rates[best - 1 : best + 2])
    bend, slope, _ = np.polyfit(x, [scores[rate] for rate in rates[best - 1 : best + 2]], 2)
    if bend >= 0:
        return rates[best]
    return float(np.exp(np.clip(-slope / (2 * bend), x[0], x[2])))


def rate_ratios(sweep: Sequence[Run], reference: str = REFERENCE) -> dict[str, Interval]:
    """Of each method, its best rate over the reference's, and a 95% bootstrap over seeds drawn for all together."""
    scores: dict[str, dict[float, dict[int, float]]] = {}
    for run in sweep:
        by_rate = scores.setdefault(run.method, {}).setdefault(run.learning_rate, {})
        by_rate[run.seed] = mean_over_training(*run.curve("held_out_accuracy"))
    seeds = sorted(set.intersection(*(set(one) for rates in scores.values() for one in rates.values())))

    def ratios(chosen: Sequence[int]) -> dict[str, float]:
        best = {
            method: interpolated_rate({rate: statistics.fmean(one[s] for s in chosen) for rate, one in rates.items()})
            for method, rates in scores.items()
        }
        return {method: rate / best[reference] for method, rate in best.items()}

    drawn = np.random.default_rng(0).choice(seeds, size=(RESAMPLES // 10, len(seeds)))
    resampled = [ratios(row.tolist()) for row in drawn]
    found = {}
    for method, estimate in ratios(seeds).items():
        low, high = np.quantile([one[method] for one in resampled], [0.025, 0.975])
        found[method] = Interval(estimate, float(low), float(high))
    return found


def rates_table(sweep: Sequence[Run]) -> str:
    """Formats ``rate_ratios``. Empty without a sweep over rates and seeds, or without the reference."""
    if len({run.learning_rate for run in sweep}) < 2 or REFERENCE not in {run.method for run in sweep}:
        return ""
    lines = ["", f"| method | best learning rate / `{REFERENCE}`'s |", "|---|---|"]
    for method, one in rate_ratios(sweep).items():
        lines.append(f"| `{method}` | {one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}] |")
    told = "By the area under the held-out curve, interpolated between rates; 95% bootstrap over the sweep's seeds"
    return "\n".join([*lines, "", f"{told}.", ""])


def at_edge(learning_rate: float, grid: Sequence[float]) -> bool:
    """Whether a better rate may lie outside the grid: the rate is its smallest or largest. False without a sweep."""
    return len(grid) > 1 and learning_rate in (min(grid), max(grid))


def speed_up(baseline_steps: Sequence[float], steps: Sequence[float], max_steps: float) -> tuple[Interval, Interval]:
    """median(baseline_steps) / median(steps): (its smallest, its largest possible value), each with a bootstrap.

    Both are lists over the same seeds, resampled together. A run that never reached the target (inf) would have
    reached it after ``max_steps`` at the earliest, so a ratio with a censored median is known only to lie between two
    values; without one they are the same. For an interval that is surely wide enough take the low end of the first
    and the high end of the second.
    """
    baseline_S, steps_S = np.asarray(baseline_steps, float), np.asarray(steps, float)  # S seeds
    n = len(steps_S)
    resampled_RS = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    intervals = []
    for numerator_S, denominator_S in (
        (np.minimum(baseline_S, max_steps), steps_S),
        (baseline_S, np.minimum(steps_S, max_steps)),
    ):
        estimate = _ratio(np.median(numerator_S), np.median(denominator_S))
        low = high = np.asarray(math.nan)
        if n > 1:
            ratios_R = _ratio(np.median(numerator_S[resampled_RS], 1), np.median(denominator_S[resampled_RS], 1))
            low, high = np.quantile(ratios_R, [0.025, 0.975], method="inverted_cdf")  # no mean of a number and inf
        intervals.append(Interval(float(estimate), float(low), float(high)))
    return intervals[0], intervals[1]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides. 0 steps over 0 steps, both there from the start, is 1; inf never meets inf here."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((numerator == 0) & (denominator == 0), 1.0, numerator / denominator)


def speedup_constant(runs: Sequence[Run]) -> Interval | None:
    """C = 8/3 * mean of sigma (arXiv 2601.23135, Theorem 3.2); below 1 it predicts that ``std`` converges faster.

    sigma is the population std of a group's 0/1 rewards, averaged over the prompts and steps of a run; the interval
    is over runs. None where the runs didn't log it.
    """
    curves = [run.curve("sigma_mean")[1] for run in runs]
    if not all(curves):
        return None
    return mean_interval([8 / 3 * statistics.fmean(values) for values in curves])


def summarize(
    finals: Mapping[str, Sequence[Run]], grid: Sequence[float], target: float, max_steps: int
) -> list[dict[str, Any]]:
    """table.csv: one row a method. None where there is nothing to say (no ``std`` to compare with, say)."""
    rows = []
    final_by_seed = {
        method: {run.seed: run.curve("held_out_accuracy")[1][-1] for run in runs} for method, runs in finals.items()
    }
    steps_by_seed = {
        method: {run.seed: steps_to_target(*run.curve("held_out_accuracy"), target) for run in runs}
        for method, runs in finals.items()
    }
    for method, runs in finals.items():
        steps, accuracy = steps_by_seed[method], final_by_seed[method]
        row: dict[str, Any] = {
            "method": method,
            "learning_rate": runs[0].learning_rate,
            "at_edge_of_grid": at_edge(runs[0].learning_rate, grid),
            "seeds": len(runs),
            "reached_target": sum(step < math.inf for step in steps.values()),
            "median_steps_to_target": statistics.median(steps.values()),
            "least_steps_to_target": min(steps.values()),
            "most_steps_to_target": max(steps.values()),
        }
        _put(row, "final_accuracy", mean_interval(list(accuracy.values())))
        reference = final_by_seed.get(REFERENCE, {})
        paired = [accuracy[seed] - reference[seed] for seed in accuracy if seed in reference]
        _put(row, f"minus_{REFERENCE}", mean_interval(paired) if paired and method != REFERENCE else None)
        both = [seed for seed in steps if seed in steps_by_seed.get(BASELINE, {})]
        at_least = at_most = None
        if both and method != BASELINE:
            baseline = [steps_by_seed[BASELINE][seed] for seed in both]
            at_least, at_most = speed_up(baseline, [steps[seed] for seed in both], max_steps)
        _put(row, f"speed_up_over_{BASELINE}_at_least", at_least)
        _put(row, f"speed_up_over_{BASELINE}_at_most", at_most)
        _put(row, "speedup_constant", speedup_constant(runs))
        rows.append(row)
    return rows


def _put(row: dict[str, Any], name: str, interval: Interval | None) -> None:
    row[name] = interval and interval.estimate
    row[f"{name}_low"] = interval and interval.low
    row[f"{name}_high"] = interval and interval.high


def markdown_tables(rows: Sequence[Mapping[str, Any]], target: float, max_steps: int) -> str:
    """table.md: what ``summarize`` found, for people."""
    lines = [
        f"| method | learning rate | steps to {target:g} | got there | final held-out accuracy | minus `{REFERENCE}` |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        edge = " (edge of the grid)" if row["at_edge_of_grid"] else ""
        median, least, most = (
            f"{row[name]:.0f}" if row[name] < math.inf else f"> {max_steps}"
            for name in ("median_steps_to_target", "least_steps_to_target", "most_steps_to_target")
        )
        cells = [
            f"`{row['method']}`",
            f"{row['learning_rate']:g}{edge}",
            f"{median} [{least}, {most}]",
            f"{row['reached_target']} of {row['seeds']}",
            _interval_text(row, "final_accuracy", ".3f"),
            _interval_text(row, f"minus_{REFERENCE}", "+.3f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    coverage = 1 - 0.5 ** (min(row["seeds"] for row in rows) - 1)
    lines += [
        "",
        f"Steps: median [least, most] over the seeds; a run that never got there counts as more than {max_steps}. "
        f"Least and most hold the true median with probability {coverage:.3f}. Accuracies: mean [95% t-interval over "
        "the seeds]; differences are paired by seed.",
        "",
        f"| method | C along its own runs | speed-up over `{BASELINE}` |",
        "|---|---|---|",
    ]
    for row in rows:
        speed = _speed_up_text(row)
        lines.append(f"| `{row['method']}` | {_interval_text(row, 'speedup_constant', '.3f')} | {speed} |")
    lines += [
        "",
        "C = 8/3 of the mean, over steps and prompts, of the std of a group's rewards (arXiv 2601.23135, Theorem 3.2): "
        f"below 1 it predicts that `{REFERENCE}` converges faster than `{BASELINE}`. Speed-up: median steps of "
        f"`{BASELINE}` / median steps of the method, to {target:g}; 95% bootstrap over seeds, resampled in pairs, wide "
        "enough for what runs that never got there leave open.",
        "",
    ]
    return "\n".join(lines)


def task_names(finals: Mapping[str, Sequence[Run]]) -> list[str]:
    """Returns the tasks of all runs, sorted; none where there is one task or no column of tasks."""
    columns = dict.fromkeys(column for runs in finals.values() for run in runs for row in run.rows for column in row)
    names = [column.removeprefix("held_out/") for column in columns if column.startswith("held_out/")]
    return sorted(names) if len(names) > 1 else []


def by_task(finals: Mapping[str, Sequence[Run]]) -> str:
    """Of each task, for people: held-out accuracy at the end and over training, the share of the gradient, the cosines
    between tasks. Means over runs with intervals; empty without several tasks."""
    names = task_names(finals)
    if not names:
        return ""
    runs = [run for one in finals.values() for run in one]
    pairs = sorted({column for run in runs for row in run.rows for column in row if column.startswith("cos/")})
    held_out, heard = ([f"{kind}/{name}" for name in names] for kind in ("held_out", "heard"))
    lines = [
        *_task_table("final held-out accuracy", finals, held_out, lambda steps, values: values[-1]),
        *_task_table("held-out accuracy over training", finals, held_out, mean_over_training),
        *_task_table("heard (share of the gradient)", finals, heard, _mean_of_values),
        *_task_table("cosine", finals, pairs, _mean_of_values),
    ]
    starts = {name: statistics.fmean(run.curve(f"held_out/{name}")[1][0] for run in runs) for name in names}
    first = ", ".join(f"{name} {start:.3f}" for name, start in starts.items())
    told = "Heard and cosines: means over the steps that logged interference. 95% t-intervals over seeds"
    return "\n".join([*lines, "", f"Before training: {first}. {told}.", ""])


def _mean_of_values(steps: Sequence[float], values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _task_table(
    title: str,
    finals: Mapping[str, Sequence[Run]],
    columns: Sequence[str],
    reduce: Callable[[Sequence[float], Sequence[float]], float],
) -> list[str]:
    """Makes a row for each method and a cell for each column: the mean over runs of the reduced curves."""
    if not any(run.curve(column)[0] for runs in finals.values() for run in runs for column in columns):
        return []
    names = [", ".join(column.split("/")[1:]) for column in columns]
    lines = ["", f"| {title} | {' | '.join(names)} |", "|---|" + "---|" * len(columns)]
    for method, runs in finals.items():
        cells = []
        for column in columns:
            curves = [run.curve(column) for run in runs]
            found = [reduce(*curve) for curve in curves if curve[0]]
            one = mean_interval(found) if found else None
            bounds = "" if one is None or math.isnan(one.low) else f" [{one.low:.3f}, {one.high:.3f}]"
            cells.append(f"{one.estimate:.3f}{bounds}" if one else "")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return lines


def _interval_text(row: Mapping[str, Any], name: str, layout: str) -> str:
    if row[name] is None:
        return ""
    bounds = f" [{row[f'{name}_low']:{layout}}, {row[f'{name}_high']:{layout}}]"
    return f"{row[name]:{layout}}" + ("" if math.isnan(row[f"{name}_low"]) else bounds)


def _speed_up_text(row: Mapping[str, Any]) -> str:
    least, most = (row[f"speed_up_over_{BASELINE}_at_{end}"] for end in ("least", "most"))
    if least is None:
        return ""
    if (least, most) == (0, math.inf):
        return "neither got there"
    if least == most:
        estimate = f"{least:.2f}"
    else:
        estimate = f"above {least:.2f}" if most == math.inf else f"below {most:.2f}"
    low, high = row[f"speed_up_over_{BASELINE}_at_least_low"], row[f"speed_up_over_{BASELINE}_at_most_high"]
    return estimate if math.isnan(low) else f"{estimate} [{low:.2f}, {high:.2f}]"
