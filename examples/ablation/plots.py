"""The plots of an ablation: reward and held-out accuracy against steps, mean and 95% band over seeds.

Above, all methods together, by their means; below, each method by itself with its band, beside ``std``. Line styles
and markers tell the methods apart without colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import Interval, Run, block_means, mean_interval
from .tables import REFERENCE

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
COLUMNS = {"reward": "reward of the sampled answers", "held_out_accuracy": "held-out accuracy"}


def mean_curve(runs: Sequence[Run], column: str, eval_every: int) -> tuple[list[float], list[Interval]]:
    """Returns steps, and the mean over runs with its interval at each. The noisy reward is averaged over ``eval_every``
    steps.
    """
    curves = [run.curve(column) for run in runs]
    if column == "reward":
        curves = [block_means(*curve, eval_every) for curve in curves]
    return curves[0][0], [mean_interval(values) for values in zip(*(values for _, values in curves), strict=True)]


def line_style(i: int, method: str) -> dict[str, str]:
    """Returns the i-th method's line, which differs from the others' in more than its colour."""
    marker, line = MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]
    return {"color": COLOURS[i % len(COLOURS)], "marker": marker, "label": method, "linestyle": line}


def _draw(axes: Any, curve: tuple[list[float], list[Interval]], style: dict[str, Any], band: bool) -> None:
    steps, points = curve
    axes.plot(steps, [point.estimate for point in points], markersize=4, linewidth=1.3, **style)
    if band:
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def draw_ablation(finals: Mapping[str, Sequence[Run]], target: float, eval_every: int, title: str, file: Path) -> None:
    """Draws the runs of each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(10.0, 1.9 * len(finals)), 10), layout="constrained")
    figure.suptitle(title)
    halves = figure.subfigures(2, 1, squeeze=False)[:, 0]
    together_axes = halves[0].subplots(1, len(COLUMNS))
    apart_axes = halves[1].subplots(len(COLUMNS), len(finals), sharex=True, sharey="row", squeeze=False)
    for k, (column, label) in enumerate(COLUMNS.items()):
        curves = {method: mean_curve(runs, column, eval_every) for method, runs in finals.items()}
        for i, (method, curve) in enumerate(curves.items()):
            style = line_style(i, method)
            _draw(together_axes[k], curve, style, band=False)
            axes = apart_axes[k][i]
            if REFERENCE in curves and method != REFERENCE:
                grey = {"color": "#888888", "marker": "", "label": REFERENCE, "linestyle": "--"}
                _draw(axes, curves[REFERENCE], grey, band=True)
            _draw(axes, curve, style, band=True)
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
                curves = [dict(zip(*run.curve(f"{column}/{name}"), strict=True)) for run in runs]
                steps = sorted(set.intersection(*(set(curve) for curve in curves)))
                points = [mean_interval([curve[step] for curve in curves]) for step in steps]
                style = line_style(i, method)
                _draw(axes, (steps, points), style, band=False)
            axes.grid(alpha=0.3)
            if k == 0:
                axes.set_title(name, fontsize=9)
            else:
                axes.set_xlabel("step")
        grid[k][0].set_ylabel(label)
    grid[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
