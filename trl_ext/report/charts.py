"""Draws the page's interactive charts by plotly, from the numbers of ``numbers.py``; readable without colours, too."""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go

from .by_task import TaskTable
from .groups import Group, mean_and_band
from .numbers import Heatmap, Histogram, PartOfModel, PromptCurvature
from .read_run import Curve
from .sections import Curves
from .what_if_table import Method, Rate

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot")
HOVER_WIDTH = 36  # characters
FEW_POINTS = 60  # curves of fewer have markers
SHORT, MOST_LABELS = 18, 24  # characters of a prompt's label, and prompts up to which there are labels
HEIGHT, MIDDLE, LARGE = 198, 290, 400  # pixels
GRID, TEXT = "#e3e6ea", "#4a5056"


def plain(text: str) -> str:
    """Escapes a text, as plotly takes some HTML in texts for markup."""
    return html.escape(text, quote=False)


def wrapped(text: str) -> str:
    """Breaks a text into lines that fit a narrow screen on hover."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, HOVER_WIDTH))


def curves_of_a_run(
    chart: Curves, curves: Mapping[str, Curve], paper: Mapping[str, Mapping[str, float]]
) -> go.Figure | None:
    """A line for each metric that was logged, once where two are the same; None where none was."""
    figure = go.Figure()
    steps: list[int] = []
    drawn: list[list[float | None]] = []
    for i, (name, label) in enumerate(chart.metrics.items()):
        if name not in curves or curves[name].values in drawn:  # a reward that is the accuracy
            continue
        steps, values = curves[name].steps, curves[name].values
        drawn.append(values)
        mode = "lines+markers" if len(steps) < FEW_POINTS or None in values else "lines"  # points between gaps
        group = "all" if chart.stacked else None
        line = _line(i, width=1.8)
        figure.add_scatter(
            x=steps, y=values, name=plain(label), stackgroup=group, mode=mode, line=line, marker={"size": 4}
        )
    if not drawn:
        return None
    for value, label in chart.reference:
        _reference(figure, steps, value, label, 0)
    for name in chart.metrics:
        reported = paper.get(name, {})
        label = "paper: " + ", ".join(f"{value:g} ({where})" for where, value in reported.items())
        for i, value in enumerate(reported.values()):
            _reference(figure, steps, value, label, i)
    return _with_axes(figure, chart)


def _line(i: int, width: float | None = None) -> go.scatter.Line:
    """The style of the i-th line."""
    return go.scatter.Line(color=COLOURS[i % len(COLOURS)], dash=DASHES[i % len(DASHES)], width=width)


def _reference(figure: go.Figure, steps: Sequence[int], value: float, label: str, i: int) -> None:
    """A dotted line that the legend names: labels in the figure would lie over one another."""
    ends = [min(steps), max(steps)] if len(steps) > 1 else [steps[0] - 1, steps[0] + 1]
    grey = ("#555555", "#888888", "#aaaaaa")[i % 3]
    line = {"dash": "dot", "color": grey, "width": 1.2}
    figure.add_scatter(x=ends, y=[value, value], name=label, mode="lines", line=line, hoverinfo="name")
    figure.data[-1].update(showlegend=i == 0, legendgroup=label)


def curves_of_groups(chart: Curves, name: str, groups: Sequence[Group]) -> go.Figure | None:
    """A line for each group of runs, and a band from its lowest to its highest run."""
    figure = go.Figure()
    for i, group in enumerate(groups):
        band = mean_and_band(group, name)
        if band is None:  # no step in common: each run by itself
            for run in group.runs:
                curve = run.curve(name)
                if curve.steps:
                    figure.add_scatter(x=curve.steps, y=curve.values, name=plain(run.name), line=_line(i))
            continue
        label = group.name
        if len(group.runs) > 1:
            label += f" (mean and range of {len(group.runs)} runs)"
            xs, ys = band.steps + band.steps[::-1], band.high + band.low[::-1]
            filled = {"fill": "toself", "fillcolor": COLOURS[i % len(COLOURS)], "opacity": 0.2, "line": {"width": 0}}
            figure.add_scatter(x=xs, y=ys, **filled, hoverinfo="skip", showlegend=False)
        figure.add_scatter(x=band.steps, y=band.mean, name=plain(label), line=_line(i))
    return _with_axes(figure, chart) if figure.data else None


def _with_axes(figure: go.Figure, chart: Curves) -> go.Figure:
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title=chart.unit)
    values = [value for trace in figure.data for value in trace.y if value is not None and math.isfinite(value)]
    if chart.log and values and min(values) > 0:
        _log_axis(figure, values)
    elif values and not chart.stacked:
        _leave_outliers_out(figure, values)
    return figure


def _leave_outliers_out(figure: go.Figure, values: Sequence[float]) -> None:
    """Ends the axis before a few far values that would take most of it, and says how many lie beyond."""
    low, high = without_outliers(values)
    if max(values) - min(values) > 3 * (high - low) > 0:
        room = 0.05 * (high - low)
        beyond = sum(not low <= value <= high for value in values)
        figure.update_yaxes(
            range=[low - room, high + room], title=f"{figure.layout.yaxis.title.text} ({beyond} beyond)"
        )


def _log_axis(figure: go.Figure, values: Sequence[float]) -> None:
    """Makes the axis logarithmic with whole numbers at its ticks; plotly would write only their first digit."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if max(values) < 30 * min(values) else (1,)
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in steps]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest of the values that lie within 3 interquartile ranges of the quartiles: a few far ones
    would take the whole scale."""
    lower, upper = np.quantile(values, [0.25, 0.75])
    room = 3 * (upper - lower)
    kept = [value for value in values if lower - room <= value <= upper + room]
    return float(min(kept)), float(max(kept))


def always_zero(chart: Curves, curves: Mapping[str, Curve]) -> bool:
    """Whether all that was logged of it is 0."""
    values = [value for name in chart.metrics if name in curves for value in curves[name].values]
    return bool(values) and not any(values)


def heatmap(maps: Sequence[Heatmap]) -> go.Figure:
    """Cosines of a logged step, square, with a slider over the steps; the prompts' texts on hover."""
    frames = [go.Frame(data=_traces(one), name=str(one.step), layout=_layout(one)) for one in maps]
    figure = go.Figure(data=_traces(maps[0]), frames=frames)
    move = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": frame.name, "method": "animate", "args": [[frame.name], move]} for frame in frames]
    sliders = [{"steps": steps, "currentvalue": {"prefix": "step ", "font": {"size": 11}}, "pad": {"t": 90}}]
    figure.update_layout(_layout(maps[0]), sliders=sliders if len(maps) > 1 else [])
    return figure


def _traces(one: Heatmap) -> tuple[go.Heatmap, go.Scatter]:
    """The cells, and hatches over those that are below 0 by more than twice the sketch's error."""
    names = [
        f"{i}. {wrapped(text)}" + ("" if reward is None else f" (reward {reward:g})")
        for i, (text, reward) in enumerate(zip(one.prompts, one.rewards, strict=True), start=1)
    ]
    texts = [[f"{row}<br>{column}" for column in names] for row in names]
    border = -2 * (one.sketch_rmse or 0.0)
    below = [(i, j) for i, row in enumerate(one.cosines) for j, value in enumerate(row) if value < border]
    size = max(2.0, min(16.0, 240 / len(names)))
    colorbar = {"title": {"text": "cosine", "font": {"size": 11}}, "thickness": 10}
    cells = go.Heatmap(z=one.cosines, zmin=-1, zmax=1, colorscale="RdBu", colorbar=colorbar)
    cells.update(customdata=texts, hovertemplate="%{customdata}<br>cosine %{z:.2f}<extra></extra>")
    marker = {"symbol": "line-ne-open", "size": size, "color": "rgba(0,0,0,.55)"}
    columns, rows = [j for _, j in below], [i for i, _ in below]
    return cells, go.Scatter(x=columns, y=rows, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)


def _layout(one: Heatmap) -> go.Layout:
    count = len(one.prompts)
    title = f"step {one.step}: {one.live} live prompts"
    labels = [plain(textwrap.shorten(text, SHORT, placeholder="…") or text[:SHORT]) for text in one.prompts]
    ticks = {"tickvals": list(range(count)), "ticktext": labels, "showticklabels": count <= MOST_LABELS}
    common = {"showgrid": False, "zeroline": False, "tickfont": {"size": 9}, **ticks, "constrain": "domain"}
    return go.Layout(
        title={"text": title, "font": {"size": 12}, "x": 0.02, "y": 0.98, "yanchor": "top"},
        xaxis={**common, "range": [-0.5, count - 0.5], "tickangle": 90},
        yaxis={**common, "range": [count - 0.5, -0.5], "scaleanchor": "x"},
    )


def histogram(numbers: Histogram) -> go.Figure:
    """The run's first and last third as shares of pairs, with two errors of the sketch on either side of 0."""
    middles = [(low + high) / 2 for low, high in pairwise(numbers.edges)]
    figure = go.Figure()
    for i, (name, counts) in enumerate(numbers.counts.items()):
        shares = [count / max(sum(counts), 1) for count in counts]
        pattern = {"shape": "/", "solidity": 0.3} if i else {}
        figure.add_bar(x=middles, y=shares, name=name, opacity=0.65, marker={"color": COLOURS[i], "pattern": pattern})
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title="cosine of two prompts' gradients", range=[-1, 1])
    figure.update_yaxes(title="share of pairs")
    if error := numbers.sketch_rmse:
        figure.add_vrect(x0=-2 * error, x1=2 * error, fillcolor="#999", opacity=0.25, line_width=0)
        marker = {"symbol": "square", "size": 10, "color": "#cfcfcf"}
        label = f"within 2 errors of the sketch ({error:.3f})"
        figure.add_scatter(x=[None], y=[None], mode="markers", name=label, marker=marker)
    return figure


def sigma_and_curvature(points: Sequence[PromptCurvature]) -> go.Figure:
    """A point for each prompt and logged step, darker the later."""
    sigmas, curvatures = [point.sigma for point in points], [point.curvature for point in points]
    marker = {"color": [point.step for point in points], "colorscale": "Viridis", "reversescale": True, "size": 5}
    marker["colorbar"] = {"title": {"text": "step", "font": {"size": 11}}, "thickness": 10}
    figure = go.Figure()
    figure.add_scatter(x=sigmas, y=curvatures, mode="markers", marker=marker)
    figure.update_traces(hovertemplate="sigma %{x:.3f}<br>curvature %{y:.3g}<extra></extra>")
    figure.update_xaxes(title="sigma, std of the prompt's rewards")
    figure.update_yaxes(title="curvature along its gradient")
    low, high = without_outliers(curvatures)
    outside = sum(not low <= value <= high for value in curvatures)
    if outside:
        margin = 0.05 * (high - low)
        title = f"curvature along its gradient ({outside} beyond)"
        figure.update_yaxes(range=[low - margin, high + margin], title=title)
    return figure


def what_if(methods: Mapping[str, Method]) -> go.Figure:
    """Each normalisation's cosine with the step taken, and its best learning rate over ``std``'s, where it is known."""
    rated = {name: (one, one.rate) for name, one in methods.items() if one.rate is not None}
    cosines, rates = [one.cos for one, _ in rated.values()], [rate.value for _, rate in rated.values()]
    high = [rate.high - rate.value for _, rate in rated.values()]
    low = [rate.value - rate.low for _, rate in rated.values()]
    figure = go.Figure()
    marker = {"size": 10, "line": {"width": 1, "color": "#333"}}
    error_y = {"type": "data", "array": high, "arrayminus": low, "thickness": 0.8, "width": 2, "color": "#999"}
    figure.add_scatter(x=cosines, y=rates, mode="markers+text", marker=marker, error_y=error_y, showlegend=False)
    labels = _labels(list(rated), cosines, rates)
    figure.update_traces(text=labels, textposition="middle left", textfont={"size": 10})
    figure.update_traces(hovertext=[_hover(name, *one) for name, one in rated.items()], hoverinfo="text")
    figure.update_xaxes(title="cosine with the step that was taken", range=[min(*cosines, 0.98) - 0.03, 1.005])
    figure.update_yaxes(title="best learning rate over std's")
    _log_axis(figure, [end for _, rate in rated.values() for end in (rate.low, rate.high)])
    return figure


def _hover(name: str, one: Method, rate: Rate) -> str:
    ends = f"[{rate.low:.2g}, {rate.high:.2g}]"
    return f"{name}<br>cosine {one.cos:.3f}<br>rate {rate.value:.3g} {ends}"


def _labels(names: list[str], cosines: list[float], rates: list[float]) -> list[str]:
    """A label for each point; of points that lie on one another the first has all their names, the others none."""
    width = max(1 - min(cosines), 0.02)
    logs = [math.log(rate) for rate in rates]
    labels, left = [""] * len(names), list(range(len(names)))
    while left:
        i = left[0]
        near = [j for j in left if abs(cosines[j] - cosines[i]) < 0.15 * width and abs(logs[j] - logs[i]) < 0.16]
        left = [j for j in left if j not in near]
        more = f" +{len(near) - 3}" if len(near) > 3 else ""
        labels[i] = ", ".join(names[j] for j in near[:3]) + more + "  "
    return labels


def parts(numbers: Mapping[str, PartOfModel]) -> go.Figure:
    """Share of the squared gradients and mean cosine, by part of the model, with the cosine's error."""
    figure = go.Figure()
    names, values = [name.replace("_", " ") for name in numbers], list(numbers.values())
    shares, cosines = [one.share for one in values], [one.cos_mean for one in values]
    figure.add_bar(x=names, y=shares, name="share of the squared gradients", marker={"color": "#b9c6d3"})
    marker = {"size": 8, "color": COLOURS[1], "symbol": "diamond"}
    error_y = {"type": "data", "array": [2 * (one.sketch_rmse or 0.0) for one in values]}
    label = "mean cosine of two prompts"
    figure.add_scatter(x=names, y=cosines, mode="markers", name=label, marker=marker, error_y=error_y)
    figure.update_yaxes(title="share; cosine")
    return figure


def tasks(numbers: TaskTable) -> go.Figure:
    """Task against task: mean cosine over steps, with its 95 % interval as text."""
    names = [plain(name) for name in numbers.names]
    figure = go.Figure()
    figure.add_heatmap(z=numbers.cosines, x=names, y=names, zmin=-1, zmax=1, colorscale="RdBu")
    figure.update_traces(text=numbers.texts, texttemplate="%{text}", colorbar={"title": "cosine", "thickness": 10})
    figure.update_yaxes(autorange="reversed")
    return figure


def as_json(figure: go.Figure, height: int = HEIGHT) -> str:
    """The figure with the page's fonts and colours, for a ``<script type="application/json">``."""
    axis = {"gridcolor": GRID, "linecolor": GRID, "zerolinecolor": "#b8bec4", "automargin": True}
    title = {"font": {"size": 11, "color": TEXT}, "standoff": 6}
    figure.update_xaxes(**axis, title=title)
    figure.update_yaxes(**axis, title=title)
    font = {"size": 11, "color": TEXT, "family": "system-ui, sans-serif"}
    margin = {"l": 48, "r": 12, "t": 26, "b": 36}
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "font": {"size": 10}}
    figure.update_layout(template=None, height=height, autosize=True, margin=margin, font=font, legend=legend)
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", hoverlabel={"font": {"size": 11}})
    # compact; no "<" that could end the script
    return json.dumps(json.loads(figure.to_json()), separators=(",", ":")).replace("<", "\\u003c")
