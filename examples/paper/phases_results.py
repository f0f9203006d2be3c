"""What the runs of ``phases.py`` come to: interference through training, the lead of ``std``, in which order.

Pure functions of ablation ``Run``s. Intervals are 95% t-intervals over seeds; what is logged several times in a span
of steps is first averaged within each run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.ablation.curves import Run, mean_interval, mean_over_training, steps_to_target
from examples.ablation.plots import COLOURS, LINES
from examples.ablation.tables import rates_table

Finals = Mapping[str, Sequence[Run]]
SPANS = 5
LOGGED_STEADILY = {  # column of a run -> its name in tables
    "near_orthogonal_frac": "near-orthogonal",
    "cos_mean": "mean cosine",
    "cos_std": "std of cosines",
    "cos_corrected_std": "std, corrected",
    "reliability": "reliability",
    "negative_pairs_frac": "pairs not above 0",
    "m_bound_p95": "M (median)",
    "sigma_mean": "sigma",
    "directional_corr": "sigma against curvature",
}
BY_MEDIAN = {"m_bound_p95"}  # a bound that one small inner product makes huge


def measured_rows(finals: Finals) -> list[dict[str, Any]]:
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


def spans(finals: Finals) -> list[tuple[float, float]]:
    """(after, until) of ``SPANS`` equal spans of steps."""
    last = max(row["step"] or 0 for runs in finals.values() for run in runs for row in run.rows)
    return [(last * i / SPANS, last * (i + 1) / SPANS) for i in range(SPANS)]


def within(run: Run, column: str, span: tuple[float, float]) -> float | None:
    """A run's mean (or median) of what it logged in a span; None where it logged nothing."""
    values = [value for step, value in zip(*run.curve(column), strict=True) if span[0] < step <= span[1]]
    if not values:
        return None
    return statistics.median(values) if column in BY_MEDIAN else statistics.fmean(values)


def over_seeds(runs: Sequence[Run], column: str, span: tuple[float, float]) -> str:
    values = [value for run in runs if (value := within(run, column, span)) is not None]
    if not values:
        return ""
    if column in BY_MEDIAN:
        return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"
    found = mean_interval(values)
    return f"{found.estimate:.3f}" + ("" if math.isnan(found.low) else f" +- {found.high - found.estimate:.3f}")


def interference_table(finals: Finals) -> list[str]:
    lines = [f"| | steps | {' | '.join(LOGGED_STEADILY.values())} |", "|---|---|" + "---|" * len(LOGGED_STEADILY)]
    for method, runs in finals.items():
        for after, until in spans(finals):
            cells = [over_seeds(runs, column, (after, until)) for column in LOGGED_STEADILY]
            lines.append(f"| `{method}` | {after + 1:.0f} to {until:.0f} | {' | '.join(cells)} |")
    return lines


def lead(finals: Finals) -> list[tuple[float, float, float, float]]:
    """(step, std's held-out accuracy less mean's, low, high) of each evaluation, paired by seed."""
    curves = {
        method: {run.seed: dict(zip(*run.curve("held_out_accuracy"), strict=True)) for run in finals[method]}
        for method in ("mean", "std")
    }
    seeds = sorted(set(curves["mean"]) & set(curves["std"]))
    found = []
    for step in sorted(set.intersection(*(set(curves[method][seed]) for method in curves for seed in seeds))):
        one = mean_interval([curves["std"][seed][step] - curves["mean"][seed][step] for seed in seeds])
        found.append((step, one.estimate, one.low, one.high))
    return found


def lead_table(finals: Finals) -> list[str]:
    accuracy = {
        method: {
            step: statistics.fmean(dict(zip(*run.curve("held_out_accuracy"), strict=True))[step] for run in runs)
            for step, *_ in lead(finals)
        }
        for method, runs in finals.items()
    }
    lines = ["| step | `mean` | `std` | `std` - `mean` |", "|---|---|---|---|"]
    for step, estimate, low, high in lead(finals):
        at = " | ".join(f"{accuracy[method][step]:.3f}" for method in ("mean", "std"))
        lines.append(f"| {step:.0f} | {at} | {estimate:+.3f} [{low:+.3f}, {high:+.3f}] |")
    areas = {
        method: {run.seed: mean_over_training(*run.curve("held_out_accuracy")) for run in finals[method]}
        for method in ("mean", "std")
    }
    one = mean_interval([areas["std"][seed] - areas["mean"][seed] for seed in areas["std"] if seed in areas["mean"]])
    at = " | ".join(f"{statistics.fmean(areas[method].values()):.3f}" for method in ("mean", "std"))
    lines.append(f"| mean over training | {at} | {one.estimate:+.3f} [{one.low:+.3f}, {one.high:+.3f}] |")
    return lines


def speed_table(finals: Finals, targets: Sequence[float] = (0.6, 0.7, 0.8)) -> list[str]:
    """Steps to accuracies, paired: log(T_std / T_mean) over the seeds where both got there, beside mean's C."""
    lines = ["| accuracy | seeds | steps of `std` / of `mean` | C to there, along `mean`'s run |", "|---|---|---|---|"]
    for target in targets:
        steps = {
            method: {run.seed: steps_to_target(*run.curve("held_out_accuracy"), target) for run in finals[method]}
            for method in ("mean", "std")
        }
        both = [s for s in steps["mean"] if 0 < steps["mean"][s] < math.inf and 0 < steps["std"].get(s, 0) < math.inf]
        if len(both) < 2:
            continue
        ratio = mean_interval([math.log(steps["std"][seed] / steps["mean"][seed]) for seed in both])
        constants = []
        for run in finals["mean"]:
            if run.seed in both:
                sigmas = [
                    v for s, v in zip(*run.curve("sigma_mean"), strict=True) if s <= max(5, steps["mean"][run.seed])
                ]
                constants += [8 / 3 * statistics.fmean(sigmas)] if sigmas else []
        of = mean_interval(constants) if len(constants) > 1 else None
        text = "" if of is None else f"{of.estimate:.2f} [{of.low:.2f}, {of.high:.2f}]"
        told = f"{math.exp(ratio.estimate):.2f} [{math.exp(ratio.low):.2f}, {math.exp(ratio.high):.2f}]"
        lines.append(f"| {target:g} | {len(both)} | {told} | {text} |")
    return lines


def phase_of(near_orthogonal: float, cos_std: float) -> int:
    """The paper's three rows without averaging or hysteresis: TrainingPhase's thresholds."""
    return 1 if near_orthogonal >= 0.9 else 2 if cos_std < 0.1 else 3


def phase_table(finals: Finals) -> list[str]:
    """Shares of the measurements of a span that are in each phase, all seeds together."""
    lines = ["| | steps | phase 1 | phase 2 | phase 3 |", "|---|---|---|---|---|"]
    for method, runs in finals.items():
        for after, until in spans(finals):
            found = [
                phase_of(row["near_orthogonal_frac"], row["cos_std"] or 0.0)
                for run in runs
                for row in run.rows
                if row.get("near_orthogonal_frac") is not None and after < (row["step"] or 0) <= until
            ]
            shares = [f"{found.count(phase) / len(found):.0%}" if found else "" for phase in (1, 2, 3)]
            lines.append(f"| `{method}` | {after + 1:.0f} to {until:.0f} | {' | '.join(shares)} |")
    return lines


def bound_table(finals: Finals) -> list[str]:
    """Assumption 4's M (95th percentile of a step's pairs with positive inner products), over all steps and seeds."""
    lines = [
        "| | measured | M: 10 %, median, 90 % | below 10 | pairs not above 0: mean | R1, R2 (medians) |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs in finals.items():
        bounds, negative, r1, r2 = (
            [value for run in runs for value in run.curve(column)[1]]
            for column in ("m_bound_p95", "negative_pairs_frac", "r1", "r2")
        )
        if len(bounds) < 2:
            continue
        tenths = statistics.quantiles(bounds, n=10)
        told = ", ".join(f"{value:.2g}" for value in (tenths[0], statistics.median(bounds), tenths[-1]))
        below = sum(value < 10 for value in bounds) / len(bounds)
        ratios = f"{statistics.median(r1):.1f}, {statistics.median(r2):.2f}"
        lines.append(
            f"| `{method}` | {len(bounds)} | {told} | {below:.0%} | {statistics.fmean(negative):.2f} | {ratios} |"
        )
    return lines


def phases_text(finals: Finals, sweep: Sequence[Run]) -> str:
    """``phases.md``."""
    rates = ", ".join(f"`{method}` {runs[0].learning_rate:g}" for method, runs in finals.items())
    sections: list[tuple[str, list[str]]] = [("Interference and sigma through training", interference_table(finals))]
    if {"mean", "std"} <= set(finals):
        sections += [("The lead of `std`", lead_table(finals)), ("Steps", speed_table(finals))]
    sections += [("Phases by the paper's rows", phase_table(finals)), ("Assumptions 4 and 5", bound_table(finals))]
    text = "\n".join(line for title, lines in sections for line in (f"## {title}", "", *lines, ""))
    return f"Learning rates: {rates}; {len(next(iter(finals.values())))} seeds.\n\n{text}{rates_table(sweep)}"


def draw_columns(axis: Any, finals: Finals, columns: Sequence[str]) -> None:
    """Draws each method's mean over seeds: of the first column with its interval, of others dotted."""
    for i, (method, runs) in enumerate(finals.items()):
        for k, column in enumerate(columns):
            curves = [dict(zip(*run.curve(column), strict=True)) for run in runs]
            steps = sorted({step for curve in curves for step in curve})
            found = [mean_interval([c[step] for c in curves if step in c]) for step in steps]
            style = {"color": COLOURS[i + 1], "linestyle": ":" if k else LINES[i], "linewidth": 1.4}
            axis.plot(steps, [one.estimate for one in found], label=None if k else method, **style)
            if not k:
                low, high = [one.low for one in found], [one.high for one in found]
                axis.fill_between(steps, low, high, color=COLOURS[i + 1], alpha=0.15, linewidth=0)


def draw_lead(axis: Any, found: Sequence[tuple[float, float, float, float]]) -> None:
    """Draws what ``lead`` found, with its intervals."""
    steps, estimates, lows, highs = zip(*found, strict=True)
    below = [estimate - low for estimate, low in zip(estimates, lows, strict=True)]
    above = [high - estimate for estimate, high in zip(estimates, highs, strict=True)]
    axis.errorbar(steps, estimates, [below, above], color="black", marker="o", markersize=3, capsize=2)
    axis.axhline(0, color="grey", linewidth=0.8)


def draw_phases(finals: Finals, path: Path) -> None:
    """Accuracy, its lead, orthogonality, cosines raw and corrected, sigma, M and pairs that aren't above 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flatten()
    panels = [
        ("held-out accuracy", ["held_out_accuracy"]),
        ("share of near-orthogonal pairs", ["near_orthogonal_frac"]),
        ("std of cosines: raw, corrected (dotted)", ["cos_std", "cos_corrected_std"]),
        ("sigma", ["sigma_mean"]),
        ("pairs not above 0", ["negative_pairs_frac"]),
    ]
    for axis, (title, columns) in zip(axes[:5], panels, strict=True):
        draw_columns(axis, finals, columns)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    if {"mean", "std"} <= set(finals):
        draw_lead(axes[5], lead(finals))
    axes[5].set_title("lead of std in held-out accuracy", fontsize=9)
    axes[5].grid(alpha=0.3)
    axes[1].axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
    axes[2].axhline(0.1, color="grey", linewidth=0.8, linestyle="--")
    axes[0].legend(fontsize=8)
    for axis in axes[3:]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
