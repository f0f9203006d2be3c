"""Tables of a study beside its own page, in Markdown: ``python examples/ablation/tables.py runs/mixture``.

Best learning rates between the sweep's, and what became of each task. Intervals are 95% intervals over seeds:
t-intervals for means, a bootstrap over seeds for ratios of learning rates.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.ablation.curves import Interval, Run, mean_interval, mean_over_training, read_runs

RESAMPLES = 1000
REFERENCE = "std"  # what differences are taken to

Finals = Mapping[str, Sequence[Run]]  # the runs at its best learning rate, by method


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


if __name__ == "__main__":
    sweep, finals = read_runs(sys.argv[1])
    print(rates_table(sweep) + by_task(finals))
