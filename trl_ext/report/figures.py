"""Figures for a paper: PDF and PNG, a column wide, told apart without colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .groups import Group, mean_and_band

WIDTH, HEIGHT = 3.4, 2.3  # inches: one column of a two-column page
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vP"
PHASE_GREYS = {1: "#f2f2f2", 2: "#d9d9d9", 3: "#bfbfbf"}
# file name -> (metric, label of the axis, a line that is drawn, its label)
CURVE_FIGURES = {
    "reward": ("reward", "reward", None, ""),
    "accuracy": ("eval_accuracy", "held-out accuracy", None, ""),
    "cosine_mean": ("interference/cos_mean", "mean cosine of two prompts", 0.0, ""),
    "near_orthogonal": ("interference/near_orthogonal_frac", "share of |cosine| < 0.1", None, ""),
    "reliability": ("interference/reliability", "reliability", None, ""),
    "speedup_constant": ("curvature/speedup_constant", "C", 1.0, "C = 1"),
    "skipped": ("compute/sequences_skipped_frac", "share of sequences that don't run", None, ""),
}


def as_label(name: str) -> str:
    """matplotlib reads "$" as mathematics, and leaves out what begins with "_"."""
    return " " + name.replace("$", r"\$")


def _figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.tick_params(labelsize=7)
    return figure, axes


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    files = [folder / f"{name}.pdf", folder / f"{name}.png"]
    for file in files:
        figure.savefig(file, dpi=300)
    return files


def draw_figures(groups: Sequence[Group], numbers: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws what the runs have into ``folder``, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for name, (metric, label, line, line_label) in CURVE_FIGURES.items():
        curves = [(group, band) for group in groups if (band := mean_and_band(group, metric)) is not None]
        if not curves:
            continue
        figure, axes = _figure()
        if len(numbers) == 1 and name in ("reward", "accuracy"):
            for span in numbers[0]["phases"]:
                first, last = span["first"], max(span["last"], span["first"] + 1)
                axes.axvspan(first, last, color=PHASE_GREYS[span["phase"]], lw=0, zorder=0)
                place = {"xy": (first, 1), "xycoords": ("data", "axes fraction"), "fontsize": 6, "va": "top"}
                axes.annotate(f" phase {span['phase']}", **place)
        for i, (group, band) in enumerate(curves):
            colour = COLOURS[i % len(COLOURS)]
            if len(group.runs) > 1:
                axes.fill_between(band["steps"], band["low"], band["high"], color=colour, alpha=0.2, lw=0)
            axes.plot(
                band["steps"], band["mean"], LINES[i % len(LINES)], color=colour, lw=1, label=as_label(group.name),
                marker=MARKERS[i % len(MARKERS)], markersize=2.5, markevery=max(1, len(band["steps"]) // 12),
            )  # fmt: skip
        if line is not None:
            axes.axhline(line, color="#888888", lw=0.8, ls=":")
            axes.annotate(
                line_label, (1, line), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
            )
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        if metric.startswith("interference/") and metric != "interference/reliability" and len(curves) == 1:
            reliability = mean_and_band(curves[0][0], "interference/reliability")
            if reliability is not None:  # a cosine says little without it
                axes.plot(reliability["steps"], reliability["mean"], ":", color="#888888", lw=1, label="reliability")
                axes.legend(fontsize=6, frameon=False)
        if len(curves) > 1:
            axes.legend(fontsize=6, frameon=False)
        files += _save(figure, folder, name)
    for i, one in enumerate(numbers):
        files += _draw_cosines(one, folder, "" if len(numbers) == 1 else f"_run{i + 1}")
    return files


def _draw_cosines(numbers: dict[str, Any], folder: Path, suffix: str) -> list[Path]:
    from matplotlib.patches import Rectangle

    if not numbers["heatmaps"]:
        return []
    last = numbers["heatmaps"][-1]
    figure, axes = _figure()
    image = axes.imshow(last["cosines"], vmin=-1, vmax=1, cmap="gray", interpolation="nearest")
    border = -2 * (last["sketch_rmse"] or 0.0)
    for row, column in np.argwhere(np.array(last["cosines"]) < border):  # told apart in print, too
        place = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(place, 1, 1, fill=False, hatch="////", linewidth=0, edgecolor="white"))
    figure.colorbar(image, ax=axes, label="cosine").ax.tick_params(labelsize=7)
    told = "" if last["reliability"] is None else f", reliability {last['reliability']:.2f}"
    axes.set_title(f"step {last['step']}, {last['live']} live prompts{told}", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    files = _save(figure, folder, f"cosines{suffix}")

    histogram = numbers["histogram"]
    figure, axes = _figure()
    for (name, counts), line in zip(histogram["counts"].items(), LINES, strict=False):
        total = max(sum(counts), 1)
        axes.stairs([count / total for count in counts], histogram["edges"], ls=line, color="#000000", lw=1, label=name)
    if histogram["sketch_rmse"]:
        error = 2 * histogram["sketch_rmse"]
        axes.axvspan(-error, error, color="#d9d9d9", lw=0, zorder=0, label="2 errors of the sketch")
    axes.set_xlabel("cosine of two prompts' gradients", fontsize=8)
    axes.set_ylabel("share of pairs", fontsize=8)
    axes.legend(fontsize=6, frameon=False)
    return files + _save(figure, folder, f"cosine_histogram{suffix}")
