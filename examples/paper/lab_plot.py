"""The lab's figures: where std helps, and whether C says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .lab_cells import Cell, by_gradients, levels, where


def draw_map(cells: Sequence[Cell], path: Path) -> None:
    """Std or not: gain in area over overlap, spread and noise, a panel for each group size and pass rate."""
    from matplotlib.figure import Figure

    overlaps, groups, pass_rates = (levels(cells, dial) for dial in ("overlap", "group", "pass_rate"))
    lines = [(spread, noise) for noise in levels(cells, "noise") for spread in levels(cells, "spread")]
    figure = Figure(figsize=(11, 13), layout="constrained")
    axes = figure.subplots(len(groups), len(pass_rates), squeeze=False)
    limit = 0.05
    for row, group in enumerate(groups):
        for column, pass_rate in enumerate(pass_rates[::-1]):
            axis = axes[row][column]
            values = np.full((len(lines), len(overlaps)), np.nan)
            for cell in where(cells, group=group, pass_rate=pass_rate):
                setting, found = cell.setting, cell.area_gain()
                place = lines.index((setting.spread, setting.noise)), overlaps.index(setting.overlap)
                gain = values[place] = found.estimate
                sure = found.low > 0 or found.high < 0
                style = {"color": "white" if abs(gain) > 0.6 * limit else "black", "alpha": 1.0 if sure else 0.45}
                axis.text(*place[::-1], f"{100 * gain:+.1f}", ha="center", va="center", fontsize=7, **style)
            image = axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            axis.set_xticks(range(len(overlaps)), [f"{value:g}" for value in overlaps])
            axis.set_yticks(range(len(lines)), [f"spread {s:g}, flips {n:g}" for s, n in lines] if not column else [])
            axis.tick_params(labelsize=7)
            gradients = "exact gradients" if not group else f"G = {group:g}"
            axis.set_title(f"{gradients}, pass rate {pass_rate:g}", fontsize=9)
            if row == len(groups) - 1:
                axis.set_xlabel("overlap of the prompts' features", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, label="accuracy over training, std minus mean")
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        "Std or not? Each at its own best learning rate; in hundredths of accuracy; faint: the 95% interval holds 0",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def draw_predictor(cells: Sequence[Cell], path: Path) -> None:
    """T_std / T_mean against C: with small steps at rates 3 : 8, and each at its best rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("small steps, rates of std and mean 3 : 8", "c_slowest", Cell.flow_ratio),
        ("each at its best constant rate", "c_steps", Cell.steps_ratio),
    )
    for axis, (title, column, read) in zip(axes, panels, strict=True):
        for label, at, marker in zip(("exact gradients", "sampled"), by_gradients(cells), "o.", strict=True):
            points = [(cell.value(column), math.exp(read(cell)), cell.setting.overlap) for cell in at]
            points = [point for point in points if all(map(math.isfinite, point))]
            if points:
                x, y, shade = zip(*points, strict=True)
                image = axis.scatter(x, y, c=shade, cmap="viridis", vmin=0, vmax=1, marker=marker, s=24, label=label)
        axis.plot([0.15, 1.4], [0.15, 1.4], color="grey", linewidth=1, label="as the theorem has it")
        axis.axhline(1, color="grey", linewidth=0.5)
        axis.set(xscale="log", yscale="log", title=title, xlabel="C = 8/3 of mean sigma along mean's run")
        ticks = [0.2, 0.3, 0.5, 0.7, 1.0, 1.4]
        for one in (axis.xaxis, axis.yaxis):
            one.set_minor_formatter("")
            one.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.legend(fontsize=8)
    axes[0].set_ylabel("steps of std / steps of mean")
    figure.colorbar(image, ax=axes, label="overlap")
    figure.savefig(path, dpi=110)
