"""The page's interactive charts, drawn by plotly from ``numbers.py``'s numbers."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from .groups import Group, mean_and_band

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot")
PHASE_COLOURS = {1: "#d9ead3", 2: "#fff2cc", 3: "#f4cccc"}
RELIABILITY = "interference/reliability"
HOVER_WIDTH = 36  # characters
FEW_POINTS = 60  # curves of fewer have markers


def plain(text: str) -> str:
    """plotly reads a little HTML in texts: a prompt's stays as it is."""
    return html.escape(text, quote=False)


def wrapped(text: str) -> str:
    """For hovering on a narrow screen."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, HOVER_WIDTH))


def curves_of_a_run(names: Sequence[str], curves: dict[str, dict[str, list[Any]]]) -> go.Figure | None:
    """A line for each metric that was logged; None where none was."""
    figure = go.Figure()
    if names[0] not in curves:
        names = [name for name in names if name != RELIABILITY]  # which stands beside others alone
    for i, name in enumerate(names):
        if name in curves:
            steps, values = curves[name]["steps"], curves[name]["values"]
            line = {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)]}
            mode = "lines+markers" if len(steps) < FEW_POINTS or None in values else "lines"  # points between gaps
            figure.add_scatter(x=steps, y=values, name=name, mode=mode, line=line)
    return _with_axes(figure, names[0] if len(names) == 1 else "")


def curves_of_groups(name: str, groups: Sequence[Group]) -> go.Figure | None:
    """A line for each group of runs, and a band from its lowest to its highest run."""
    figure = go.Figure()
    for i, group in enumerate(groups):
        band = mean_and_band(group, name)
        if band is None:  # no step in common: each run by itself
            for run in group.runs:
                steps, values = run.curve(name)
                if steps:
                    line = {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)]}
                    figure.add_scatter(x=steps, y=values, name=plain(run.name), line=line)
            continue
        colour, several = COLOURS[i % len(COLOURS)], len(group.runs) > 1
        if several:
            figure.add_scatter(
                x=band["steps"] + band["steps"][::-1], y=band["high"] + band["low"][::-1], fill="toself",
                fillcolor=colour, opacity=0.2, line={"width": 0}, hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        label = f"{group.name} (mean and range of {len(group.runs)} runs)" if several else group.name
        line = {"color": colour, "dash": DASHES[i % len(DASHES)]}
        figure.add_scatter(x=band["steps"], y=band["mean"], name=plain(label), line=line)
    return _with_axes(figure, name)


def _with_axes(figure: go.Figure, name: str) -> go.Figure | None:
    if not figure.data:
        return None
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title=name)
    return figure


def shade_phases(figure: go.Figure, phases: Sequence[dict[str, int]]) -> None:
    """Behind the curves, with their numbers."""
    for span in phases:
        figure.add_vrect(
            x0=span["first"], x1=max(span["last"], span["first"] + 1), fillcolor=PHASE_COLOURS[span["phase"]],
            opacity=0.5, layer="below", line_width=0, annotation_text=f"phase {span['phase']}",
            annotation_position="top left",
        )  # fmt: skip


def reference_line(figure: go.Figure, value: float, label: str) -> None:
    """A value to compare with."""
    figure.add_hline(y=value, line={"dash": "dash", "color": "#888"}, annotation_text=label)


def heatmap(maps: Sequence[dict[str, Any]]) -> go.Figure:
    """Cosines of a logged step, with a slider over the steps; the prompts' texts on hover."""

    def trace(one: dict[str, Any]) -> go.Heatmap:
        names = [
            f"{i + 1}. {wrapped(text)}" + ("" if reward is None else f" (reward {reward:g})")
            for i, (text, reward) in enumerate(zip(one["prompts"], one["rewards"], strict=True))
        ]
        return go.Heatmap(
            z=one["cosines"], x=names, y=names, zmin=-1, zmax=1, colorscale="RdBu",
            colorbar={"title": "cosine", "thickness": 12},
            hovertemplate="%{x}<br>%{y}<br>cosine %{z:.2f}<extra></extra>",
        )  # fmt: skip

    def layout(one: dict[str, Any]) -> dict[str, Any]:
        n, reliability = len(one["prompts"]), one["reliability"]
        told = "reliability unknown" if reliability is None else f"reliability {reliability:.2f}"
        title = f"step {one['step']}: {one['live']} live prompts, {told}"
        return {
            "title": {"text": title, "font": {"size": 14}},
            "xaxis": {"range": [-0.5, n - 0.5], "showticklabels": False},
            "yaxis": {"range": [n - 0.5, -0.5], "showticklabels": False},
        }

    frames = [go.Frame(data=[trace(one)], name=str(one["step"]), layout=layout(one)) for one in maps]
    figure = go.Figure(data=[trace(maps[0])], frames=frames)
    move = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": frame.name, "method": "animate", "args": [[frame.name], move]} for frame in frames]
    sliders = [{"steps": steps, "currentvalue": {"prefix": "step "}, "pad": {"t": 24}}]
    figure.update_layout(**layout(maps[0]), sliders=sliders)
    return figure


def histogram(numbers: dict[str, Any]) -> go.Figure:
    """The run's first and last third as shares of pairs, with two errors of the sketch on either side of 0."""
    middles = [(low + high) / 2 for low, high in pairwise(numbers["edges"])]
    figure = go.Figure()
    for i, (name, counts) in enumerate(numbers["counts"].items()):
        shares = [count / max(sum(counts), 1) for count in counts]
        figure.add_bar(x=middles, y=shares, name=name, opacity=0.6, marker_color=COLOURS[i])
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="cosine of two prompts' gradients", range=[-1, 1])
    figure.update_yaxes(title="share of pairs")
    error = numbers["sketch_rmse"]
    if error:
        label = f"within 2 errors of the sketch ({error:.3f})"
        figure.add_vrect(
            x0=-2 * error, x1=2 * error, fillcolor="#999", opacity=0.25, line_width=0, annotation_text=label
        )
    return figure


def sigma_and_curvature(points: Sequence[dict[str, Any]]) -> go.Figure:
    """A point for each prompt and logged step, coloured by step."""
    colour = {"color": [point["step"] for point in points], "colorscale": "Viridis", "size": 6}
    figure = go.Figure(
        go.Scatter(
            x=[point["sigma"] for point in points], y=[point["curvature"] for point in points], mode="markers",
            marker={**colour, "colorbar": {"title": "step", "thickness": 12}},
            hovertemplate="sigma %{x:.3f}<br>curvature %{y:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="sigma: population std of the prompt's rewards")
    figure.update_yaxes(title="measured curvature along its gradient")
    return figure


def as_html(figure: go.Figure, height: int = 380) -> str:
    """A ``div`` for a page that holds plotly's script."""
    figure.update_layout(
        template="plotly_white", height=height, autosize=True, margin={"l": 48, "r": 16, "t": 48, "b": 48},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
    )  # fmt: skip
    settings = {"responsive": True, "displayModeBar": False}
    return figure.to_html(full_html=False, include_plotlyjs=False, auto_play=False, config=settings)
