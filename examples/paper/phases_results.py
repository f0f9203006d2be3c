"""What a study's runs come to: interference through training, the lead of ``std``, in which order.

Pure functions of ablation ``Run``s. Intervals are 95% t-intervals over seeds; what is logged several times in a span
of steps is first averaged within each run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.ablation.curves import Interval, Run, mean_curve, mean_interval, mean_over_training, steps_to_target
from examples.ablation.tables import Finals, markdown, rates_table, sections

SPANS = 5
COLOURS, LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), ("-", "--", "-.", ":")
LOGGED_STEADILY = {  # column of a run -> its name in tables
    "near_orthogonal_frac": "near-orthogonal",
    "cos_mean": "mean cosine",
    "cos_std": "std of cosines",
    "negative_pairs_frac": "pairs not above 0",
    "m_bound_p95": "M (median)",
    "sigma_mean": "sigma",
    "directional_corr": "sigma against curvature",
}
BY_MEDIAN = {"m_bound_p95"}  # a bound that one small inner product makes huge
Span = tuple[float, float]  # of steps: after, until


def measured_rows(finals: Finals) -> list[dict[str, str | float | None]]:
    """A row for each step that measured interference or held-out accuracy."""
    columns = ["held_out_accuracy", *LOGGED_STEADILY, "conflict_frac", "speedup_constant", "r1", "r2", "training_phase"]
    return [
        {"method": method, "learning_rate": run.learning_rate, "seed": run.seed, "step": row["step"]}
        | {name: row.get(name) for name in columns}
        for method, runs in finals.items()
        for run in runs
        for row in run.rows
        if row.get("near_orthogonal_frac") is not None or row.get("held_out_accuracy") is not None
    ]


def spans(finals: Finals) -> list[Span]:
    """``SPANS`` equal spans of steps."""
    last = max(row["step"] or 0 for runs in finals.values() for run in runs for row in run.rows)
    return [(last * i / SPANS, last * (i + 1) / SPANS) for i in range(SPANS)]


def within(run: Run, column: str, span: Span) -> list[float]:
    """What a run logged in a span of steps."""
    return [value for step, value in run.by_step(column).items() if span[0] < step <= span[1]]


def over_seeds(runs: Sequence[Run], column: str, span: Span) -> str:
    """The mean with its interval, or the median with its range, of the runs that logged the column in the span."""
    logged = [values for run in runs if (values := within(run, column, span))]
    if not logged:
        return ""
    if column in BY_MEDIAN:
        medians = [statistics.median(values) for values in logged]
        return f"{statistics.median(medians):.2g} ({min(medians):.2g} to {max(medians):.2g})"
    return plus_minus(mean_interval([statistics.fmean(values) for values in logged]))


def plus_minus(one: Interval) -> str:
    return f"{one.estimate:.3f}" + ("" if math.isnan(one.low) else f" +- {one.high - one.estimate:.3f}")


def by_span(finals: Finals, head: Sequence[str], cells: Callable[[Sequence[Run], Span], list[str]]) -> list[str]:
    """A table with a row for each method and span."""
    rows = [
        [f"`{method}`", f"{span[0] + 1:.0f} to {span[1]:.0f}", *cells(runs, span)]
        for method, runs in finals.items()
        for span in spans(finals)
    ]
    return markdown(["", "steps", *head], rows)


def interference_table(finals: Finals) -> list[str]:
    def cells(runs: Sequence[Run], span: Span) -> list[str]:
        return [over_seeds(runs, column, span) for column in LOGGED_STEADILY]

    return by_span(finals, list(LOGGED_STEADILY.values()), cells)


def compare(finals: Finals, read: Callable[[Run], float]) -> tuple[float, float, Interval]:
    """Of what is read from the runs: ``mean``'s and ``std``'s mean over runs, and ``std`` less ``mean``, paired by
    seed."""
    mean, std = ({run.seed: read(run) for run in finals[method]} for method in ("mean", "std"))
    difference = mean_interval([std[seed] - mean[seed] for seed in std if seed in mean])
    return statistics.fmean(mean.values()), statistics.fmean(std.values()), difference


def lead(finals: Finals) -> dict[float, tuple[float, float, Interval]]:
    """By evaluated step, ``compare`` of the held-out accuracies."""
    curves = [run.by_step("held_out_accuracy") for method in ("mean", "std") for run in finals[method]]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: compare(finals, lambda run, at=step: run.by_step("held_out_accuracy")[at]) for step in steps}


def lead_table(finals: Finals) -> list[str]:
    found = {f"{step:.0f}": one for step, one in lead(finals).items()}
    found["mean over training"] = compare(finals, lambda run: mean_over_training(*run.curve("held_out_accuracy")))
    rows = [
        [name, f"{mean:.3f}", f"{std:.3f}", f"{difference:+.3f}"] for name, (mean, std, difference) in found.items()
    ]
    return markdown(["step", "`mean`", "`std`", "`std` - `mean`"], rows)


def speed_table(finals: Finals, targets: Sequence[float] = (0.6, 0.7, 0.8)) -> list[str]:
    """Compares steps to accuracies, log(T_std / T_mean) paired by seed, with the std of the groups of ``mean``."""
    rows = []
    for target in targets:
        steps = {
            method: {run.seed: steps_to_target(*run.curve("held_out_accuracy"), target) for run in finals[method]}
            for method in ("mean", "std")
        }
        both = [s for s in steps["mean"] if 0 < steps["mean"][s] < math.inf and 0 < steps["std"].get(s, 0) < math.inf]
        if len(both) < 2:
            continue
        ratio = mean_interval([math.log(steps["std"][seed] / steps["mean"][seed]) for seed in both])
        ratio = Interval(*(math.exp(one) for one in (ratio.estimate, ratio.low, ratio.high)))
        reached = [run for run in finals["mean"] if run.seed in both]
        sigmas = [within(run, "sigma_mean", (-1, max(5, steps["mean"][run.seed]))) for run in reached]
        constants = [8 / 3 * statistics.fmean(values) for values in sigmas if values]
        constant = f"{mean_interval(constants):.2f}" if len(constants) > 1 else ""
        rows.append([f"{target:g}", f"{len(both)}", f"{ratio:.2f}", constant])
    return markdown(
        ["accuracy", "seeds", "steps of `std` / of `mean`", "8/3 of the groups' own std to there, along `mean`'s run"],
        rows,
    )


def phase_of(near_orthogonal: float, cos_std: float) -> int:
    """The paper's three rows without averaging or hysteresis: TrainingPhase's thresholds."""
    return 1 if near_orthogonal >= 0.9 else 2 if cos_std < 0.1 else 3


def phase_table(finals: Finals) -> list[str]:
    """Shares of the measurements of a span that are in each phase, all seeds together."""

    def cells(runs: Sequence[Run], span: Span) -> list[str]:
        rows = [row for run in runs for row in run.rows if span[0] < (row["step"] or 0) <= span[1]]
        pairs = [(row.get("near_orthogonal_frac"), row.get("cos_std") or 0.0) for row in rows]
        found = [phase_of(share, cos_std) for share, cos_std in pairs if share is not None]
        return [f"{found.count(phase) / len(found):.0%}" if found else "" for phase in (1, 2, 3)]

    return by_span(finals, ["phase 1", "phase 2", "phase 3"], cells)


def bound_table(finals: Finals) -> list[str]:
    """Assumption 4's M (95th percentile of a step's pairs with positive inner products), over all steps and seeds."""
    rows = []
    for method, runs in finals.items():
        bounds, negative, r1, r2 = (
            [value for run in runs for value in run.curve(column)[1]]
            for column in ("m_bound_p95", "negative_pairs_frac", "r1", "r2")
        )
        if len(bounds) < 2:
            continue
        tenths = statistics.quantiles(bounds, n=10)
        range_of_m = ", ".join(f"{value:.2g}" for value in (tenths[0], statistics.median(bounds), tenths[-1]))
        below = sum(value < 10 for value in bounds) / len(bounds)
        ratios = f"{statistics.median(r1):.1f}, {statistics.median(r2):.2f}"
        shares = [f"{below:.0%}", f"{statistics.fmean(negative):.2f}"]
        rows.append([f"`{method}`", f"{len(bounds)}", range_of_m, *shares, ratios])
    head = ["M: 10 %, median, 90 %", "below 10", "pairs not above 0: mean", "R1, R2 (medians)"]
    return markdown(["", "measured", *head], rows)


def phases_text(finals: Finals, sweep: Sequence[Run]) -> str:
    """``phases.md``."""
    rates = ", ".join(f"`{method}` {runs[0].learning_rate:g}" for method, runs in finals.items())
    parts = {"Interference and sigma through training": interference_table(finals)}
    if {"mean", "std"} <= set(finals):
        parts |= {"The lead of `std`": lead_table(finals), "Steps": speed_table(finals)}
    parts |= {"Phases by the paper's rows": phase_table(finals), "Assumptions 4 and 5": bound_table(finals)}
    seeds = len(next(iter(finals.values())))
    return f"Learning rates: {rates}; {seeds} seeds.\n\n{sections(parts)}{rates_table(sweep)}"


def draw_curve(axis: Any, curve: Mapping[float, Interval], style: Mapping[str, object], band: float) -> None:
    """Draws the means, and a band of their intervals of this opacity."""
    points = list(curve.values())
    axis.plot(list(curve), [point.estimate for point in points], **style)
    low, high = [point.low for point in points], [point.high for point in points]
    axis.fill_between(list(curve), low, high, color=style["color"], alpha=band, linewidth=0)


def draw_columns(axis: Any, finals: Finals, columns: Sequence[str]) -> None:
    """Draws each method's mean over seeds: of the first column with its interval, of others dotted."""
    for i, (method, runs) in enumerate(finals.items()):
        for k, column in enumerate(columns):
            style = {"color": COLOURS[i % 4], "linestyle": ":" if k else LINES[i % 4], "linewidth": 1.4}
            curve = mean_curve([run.by_step(column) for run in runs])
            draw_curve(axis, curve, {**style, "label": None if k else method}, band=0 if k else 0.15)


def draw_lead(axis: Any, finals: Finals) -> None:
    """Draws the lead of ``std`` with its intervals."""
    found = {step: difference for step, (_, _, difference) in lead(finals).items()}
    estimates = [one.estimate for one in found.values()]
    ends = [[one.estimate - one.low for one in found.values()], [one.high - one.estimate for one in found.values()]]
    axis.errorbar(list(found), estimates, ends, color="black", marker="o", markersize=3, capsize=2)
    axis.axhline(0, color="grey", linewidth=0.8)


PANELS = {
    "held-out accuracy": ["held_out_accuracy"],
    "share of near-orthogonal pairs": ["near_orthogonal_frac"],
    "std of cosines": ["cos_std"],
    "sigma": ["sigma_mean"],
    "pairs not above 0": ["negative_pairs_frac"],
    "lead of std in held-out accuracy": [],
}


def draw_phases(finals: Finals, path: Path) -> None:
    """Accuracy, its lead, orthogonality, the spread of cosines, sigma, and pairs that aren't above 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flatten()
    for axis, (title, columns) in zip(axes, PANELS.items(), strict=True):
        draw_columns(axis, finals, columns)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    if {"mean", "std"} <= set(finals):
        draw_lead(axes[5], finals)
    axes[1].axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
    axes[2].axhline(0.1, color="grey", linewidth=0.8, linestyle="--")
    axes[0].legend(fontsize=8)
    for axis in axes[3:]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
