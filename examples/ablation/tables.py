"""Compares the methods of an ablation: tables in Markdown.

Intervals are 95% intervals over seeds: t-intervals for means and for paired differences, a bootstrap over seeds for
ratios of learning rates.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .curves import Interval, Run, mean_interval, mean_over_training, steps_to_target

RESAMPLES = 1000
REFERENCE = "std"  # what differences are taken to

Finals = Mapping[str, Sequence[Run]]  # the runs at its best learning rate, by method


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes rows of named values; a column that only some rows have is empty in the others."""
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def sections(tables: Mapping[str, Sequence[str]]) -> str:
    """Puts tables below their titles."""
    return "\n".join(line for title, lines in tables.items() for line in (f"## {title}", "", *lines, ""))


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

    drawn = np.random.default_rng(0).choice(seeds, size=(RESAMPLES, len(seeds)))
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
    rows = [[f"`{method}`", f"{one:.2f}"] for method, one in rate_ratios(sweep).items()]
    lines = markdown(["method", f"best learning rate / `{REFERENCE}`'s"], rows)
    told = "By the area under the held-out curve, interpolated between rates; 95% bootstrap over the sweep's seeds"
    return "\n".join(["", *lines, "", f"{told}.", ""])


def at_edge(learning_rate: float, grid: Sequence[float]) -> bool:
    """Whether a better rate may lie outside the grid: the rate is its smallest or largest. False without a sweep."""
    return len(grid) > 1 and learning_rate in (min(grid), max(grid))


def own_stds(runs: Sequence[Run]) -> list[float]:
    """Returns 8/3 of the groups' own std, a mean over prompts and steps, of each run; none where a run didn't log it.

    It is below C of arXiv 2601.23135, Theorem 3.2, as a small group's population std is below the true sigma.
    """
    curves = [run.curve("sigma_mean")[1] for run in runs]
    return [8 / 3 * statistics.fmean(values) for values in curves] if all(curves) else []


def methods_table(finals: Finals, grid: Sequence[float], target: float, max_steps: int) -> str:
    """Compares steps to the target, final accuracy, its difference to ``std`` paired by seed and the groups' std."""
    final_by_seed = {
        method: {run.seed: run.curve("held_out_accuracy")[1][-1] for run in runs} for method, runs in finals.items()
    }
    reference = final_by_seed.get(REFERENCE, {})
    rows = []
    for method, runs in finals.items():
        rate, accuracy = runs[0].learning_rate, final_by_seed[method]
        steps = [steps_to_target(*run.curve("held_out_accuracy"), target) for run in runs]
        median, least, most = (
            f"{step:.0f}" if step < math.inf else f"> {max_steps}"
            for step in (statistics.median(steps), min(steps), max(steps))
        )
        paired = [accuracy[seed] - reference[seed] for seed in accuracy if seed in reference and method != REFERENCE]
        rows.append(
            [
                f"`{method}`",
                f"{rate:g}{' (edge of the grid)' if at_edge(rate, grid) else ''}",
                f"{median} [{least}, {most}]",
                f"{sum(step < math.inf for step in steps)} of {len(runs)}",
                mean_text(list(accuracy.values())),
                mean_text(paired, "+.3f"),
                mean_text(own_stds(runs)),
            ]
        )
    accuracies = ["final held-out accuracy", f"minus `{REFERENCE}`", "8/3 of the groups' own std"]
    lines = markdown(["method", "learning rate", f"steps to {target:g}", "got there", *accuracies], rows)
    coverage = 1 - 0.5 ** (min(map(len, finals.values())) - 1)
    told = (
        f"Steps: median [least, most] over the seeds; a run that never got there counts as more than {max_steps}. "
        f"Least and most hold the true median with probability {coverage:.3f}. Accuracies: mean [95% t-interval over "
        "the seeds]; differences are paired by seed. 8/3 of the groups' own std, a mean over steps and prompts, "
        "is below C of arXiv 2601.23135, Theorem 3.2; C below 1 predicts that `std` converges faster than `mean`."
    )
    return "\n".join([*lines, "", told, ""])


def mean_text(values: Sequence[float], layout: str = ".3f") -> str:
    """Formats the mean and its interval; empty without values."""
    return f"{mean_interval(values):{layout}}" if values else ""


def task_names(finals: Finals) -> list[str]:
    """Returns the tasks of all runs, sorted; none where there is one task or no column of tasks."""
    names = {name.removeprefix("held_out/") for name in columns_of(finals) if name.startswith("held_out/")}
    return sorted(names) if len(names) > 1 else []


def columns_of(finals: Finals) -> set[str]:
    return {column for runs in finals.values() for run in runs for row in run.rows for column in row}


def by_task(finals: Finals) -> str:
    """Of each task, for people: held-out accuracy at the end and over training, the share of the gradient, the cosines
    between tasks. Means over runs with intervals; empty without several tasks."""
    names = task_names(finals)
    if not names:
        return ""
    pairs = sorted(column for column in columns_of(finals) if column.startswith("cos/"))
    held_out, heard = ([f"{kind}/{name}" for name in names] for kind in ("held_out", "heard"))
    lines = [
        *_task_table("final held-out accuracy", finals, held_out, lambda steps, values: values[-1]),
        *_task_table("held-out accuracy over training", finals, held_out, mean_over_training),
        *_task_table("heard (share of the gradient)", finals, heard, lambda steps, values: statistics.fmean(values)),
        *_task_table("cosine", finals, pairs, lambda steps, values: statistics.fmean(values)),
    ]
    runs = [run for one in finals.values() for run in one]
    starts = {name: statistics.fmean(run.curve(f"held_out/{name}")[1][0] for run in runs) for name in names}
    first = ", ".join(f"{name} {start:.3f}" for name, start in starts.items())
    told = "Heard and cosines: means over the steps that logged interference. 95% t-intervals over seeds"
    return "\n".join([*lines, "", f"Before training: {first}. {told}.", ""])


def _task_table(
    title: str, finals: Finals, columns: Sequence[str], reduce: Callable[[Sequence[float], Sequence[float]], float]
) -> list[str]:
    """Makes a row for each method and a cell for each column: the mean over runs of the reduced curves."""
    rows = []
    for method, runs in finals.items():
        curves = [[curve for run in runs if (curve := run.curve(column))[0]] for column in columns]
        rows.append([f"`{method}`", *(mean_text([reduce(*curve) for curve in of_runs]) for of_runs in curves)])
    head = [title, *(", ".join(column.split("/")[1:]) for column in columns)]
    return ["", *markdown(head, rows)] if any(cell for row in rows for cell in row[1:]) else []
