"""The plots of an ablation: reward and held-out accuracy against steps, mean and 95% band over seeds.

Above, all methods together, by their means; below, each method by itself with its band, beside ``std``. Line styles
and markers tell the methods apart without colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import Interval, Run, block_means, mean_curve
from .tables import REFERENCE

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
COLUMNS = {"reward": "reward of the sampled answers", "held_out_accuracy": "held-out accuracy"}


def line_style(i: int, method: str) -> dict[str, str]:
    """Returns the i-th method's line, which differs from the others' in more than its colour."""
    marker, line = MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": marker, "label": method, "linestyle": line}


def draw_curve(axis: Any, curve: Mapping[float, Interval], style: Mapping[str, object], band: float = 0.0) -> None:
    """Draws the means, and a band of their intervals of this opacity."""
    points = list(curve.values())
    axis.plot(list(curve), [point.estimate for point in points], markersize=4, **{"linewidth": 1.3, **style})
    if band:
        low, high = [point.low for point in points], [point.high for point in points]
        axis.fill_between(list(curve), low, high, color=style["color"], alpha=band, linewidth=0)


def draw_ablation(finals: Mapping[str, Sequence[Run]], target: float, eval_every: int, title: str, file: Path) -> None:
    """Draws the runs of each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(10.0, 1.9 * len(finals)), 10), layout="constrained")
    figure.suptitle(title)
    halves = figure.subfigures(2, 1, squeeze=False)[:, 0]
    together_axes = halves[0].subplots(1, len(COLUMNS))
    apart_axes = halves[1].subplots(len(COLUMNS), len(finals), sharex=True, sharey="row", squeeze=False)
    for k, (column, label) in enumerate(COLUMNS.items()):
        curves = {}
        for method, runs in finals.items():
            of_runs = [run.by_step(column) for run in runs]
            curves[method] = mean_curve([block_means(c, eval_every) for c in of_runs] if k == 0 else of_runs)
        for i, (method, curve) in enumerate(curves.items()):
            style = line_style(i, method)
            draw_curve(together_axes[k], curve, style)
            axes = apart_axes[k][i]
            if REFERENCE in curves and method != REFERENCE:
                grey = {"color": "#888888", "marker": "", "label": REFERENCE, "linestyle": "--"}
                draw_curve(axes, curves[REFERENCE], grey, band=0.2)
            draw_curve(axes, curve, style, band=0.2)
            if k == 0:
                axes.set_title(method, fontsize=9)
            if i == 0:
                axes.set_ylabel(label)
            if k == len(COLUMNS) - 1:
                axes.set_xlabel("step")
        together_axes[k].set_xlabel("step")
        together_axes[k].set_ylabel(label)
        for axes in [together_axes[k], *apart_axes[k]]:
            axes.grid(alpha=0.3)
            if column == "held_out_accuracy":
                axes.axhline(target, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    together_axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)


def draw_tasks(finals: Mapping[str, Sequence[Run]], names: Sequence[str], file: Path) -> None:
    """Draws the held-out accuracy of each task for all methods, and below it each task's share of the gradient."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(names), 6), layout="constrained")
    rows = {"held_out": "held-out accuracy", "heard": "share of the gradient"}
    grid = figure.subplots(len(rows), len(names), sharex=True, sharey="row", squeeze=False)
    for k, (column, label) in enumerate(rows.items()):
        for axes, name in zip(grid[k], names, strict=True):
            for i, (method, runs) in enumerate(finals.items()):
                curve = mean_curve([run.by_step(f"{column}/{name}") for run in runs], in_all=True)
                draw_curve(axes, curve, line_style(i, method))
            axes.grid(alpha=0.3)
            if k == 0:
                axes.set_title(name, fontsize=9)
            else:
                axes.set_xlabel("step")
        grid[k][0].set_ylabel(label)
    grid[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
