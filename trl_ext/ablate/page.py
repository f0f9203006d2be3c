"""Writes what a study found: an HTML page in the report's style, CSV files, JSON."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_ext.report.evidence import interval

from .answer import answers, not_tested
from .compare import PLACEBO, Difference, Reached, Summary
from .plan import Plan
from .rates import Choice, Scores
from .study import Result, Run, write_whole

HEIGHT = 430  # pixels


@dataclass(frozen=True)
class Found:
    """All that a study found, as pages and files show it."""

    title: str
    command: str
    metric: str
    target: float
    steps: int
    plan: Plan
    summaries: list[Summary]
    differences: list[Difference]
    scores: dict[str, Scores]
    unpaired: list[int]

    @property
    def sentences(self) -> list[str]:
        return answers(self.plan, self.summaries, self.differences)

    @property
    def untested(self) -> list[str]:
        lines = not_tested(self.plan, self.summaries, self.steps, self.metric)
        if self.unpaired:
            seeds = ", ".join(map(str, self.unpaired))
            lines.append(
                f"Equal prompts: the script's data differ between runs of seed {seeds}, so nothing is paired there."
            )
        return lines


def cost(one: Reached, layout: str = ".0f") -> str:
    """Formats a median and its range."""

    def text(value: float) -> str:
        return "never" if math.isinf(value) else "-" if math.isnan(value) else f"{value:,{layout}}"

    return f"{text(one.median)} [{text(one.least)}, {text(one.most)}]"


def table_rows(found: Found) -> list[dict[str, Any]]:
    """Returns a row for each variant, as text and numbers for the template."""
    by_name = {one.name: one for one in found.differences}
    rows = []
    for one in found.summaries:
        other = by_name.get(one.name)
        ends = (
            "too few seeds" if other and math.isinf(other.low) else other and f"[{other.low:+.3f}, {other.high:+.3f}]"
        )
        rows.append(
            {
                "name": one.name,
                "rate": one.choice.rate,
                "at_edge": one.choice.at_edge,
                "final": one.mean,
                "difference": f"{other.difference:+.3f} {ends}" if other else "",
                "told": bool(other and other.told),
                "reached": f"{one.reached} of {len(one.final)}",
                "steps": cost(one.steps),
                "tokens": cost(one.tokens),
                "seconds": cost(one.seconds),
            }
        )
    return rows


def interval_note(found: Found) -> str:
    """Says what the intervals hold."""
    widened = {one.widened for one in found.differences}
    text = f"Paired by seed, t over {len(found.summaries[0].final)} seeds"
    if "1.4" in widened:
        return f"{text}, times 1.4 for the choice of learning rates, which fewer than three tuning seeds can't measure."
    return (
        f"{text}, and the choice of learning rates by a bootstrap over tuning seeds."
        if "bootstrap" in widened
        else f"{text}."
    )


def sweep_rows(found: Found, rates: Sequence[float]) -> list[dict[str, Any]]:
    """Returns a row for each variant that was swept: its mean score at each rate."""
    rows = []
    for one in found.summaries:
        scores = found.scores.get(one.name, {})
        if len(scores) > 1:
            means = {rate: statistics.fmean(by_seed.values()) for rate, by_seed in scores.items()}
            cells = [
                {"text": f"{means[rate]:.3f}" if rate in means else "", "chosen": rate == one.choice.rate}
                for rate in rates
            ]
            rows.append({"name": one.name, "centre": one.choice.centre, "cells": cells})
    return rows


def figure(summaries: Sequence[Summary]) -> str:
    """Draws each variant's mean curve with its band, as plotly's JSON."""
    import plotly.graph_objects as go

    from trl_ext.report import charts

    drawn = go.Figure()
    for i, one in enumerate(summaries):
        by_step: dict[int, list[float]] = {}
        for curve in one.curves.values():
            for step, value in zip(curve.steps, curve.values, strict=True):
                by_step.setdefault(step, []).append(value)
        steps = [step for step in sorted(by_step) if len(by_step[step]) == len(one.curves)]
        bands = [interval(by_step[step]) for step in steps]
        if bands and all(math.isfinite(low) for _, low, _ in bands):
            outline = [high for *_, high in bands] + [low for _, low, _ in reversed(bands)]
            filled = {"fill": "toself", "fillcolor": charts.COLOURS[i % len(charts.COLOURS)], "opacity": 0.15}
            drawn.add_scatter(
                x=steps + steps[::-1], y=outline, **filled, line={"width": 0}, hoverinfo="skip", showlegend=False
            )
        line = {"color": charts.COLOURS[i % len(charts.COLOURS)], "dash": charts.DASHES[i % len(charts.DASHES)]}
        drawn.add_scatter(x=steps, y=[mean for mean, *_ in bands], name=charts.plain(one.name), line=line)
    drawn.update_xaxes(title="optimizer step")
    return charts.as_json(drawn, HEIGHT)


def write_page(found: Found, file: Path) -> None:
    """Writes the page."""
    from markupsafe import Markup

    from trl_ext.report.page import plotly_gzip, template

    rates = sorted({rate for scores in found.scores.values() for rate in scores})
    placebo = any(one.name.endswith(PLACEBO) for one in found.differences)
    page = template("answer.html.jinja").render(
        title=found.title,
        metric=found.metric,
        target=found.target,
        steps=found.steps,
        answers=found.sentences,
        not_tested=found.untested,
        rows=table_rows(found),
        intervals=interval_note(found),
        comparisons=len(found.differences) - placebo,
        placebo=placebo,
        sweep=sweep_rows(found, rates),
        sweep_rates=rates,
        tuning_seeds=", ".join(map(str, found.plan.tuning_seeds)),
        plan=found.plan.lines(),
        command=found.command,
        figures=[Markup(figure(found.summaries))],
        plotly_gzip=plotly_gzip(),
        height=HEIGHT,
    )
    file.write_text(page, encoding="utf-8")


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of named values; a column that only some rows have is empty in the others."""
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def log_rows(part: str, runs: Mapping[str, Sequence[tuple[Run, Result]]]) -> list[dict[str, Any]]:
    """Returns a row for each step of each run, by method, with every number of its log."""
    rows = []
    for method, (run, result) in ((name, pair) for name, pairs in runs.items() for pair in pairs):
        own = {"part": part, "method": method, "learning_rate": run.learning_rate, "seed": run.seed}
        steps: dict[int, dict[str, Any]] = {}
        for entry in result.logs:
            numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
            steps.setdefault(int(entry.get("step", 0)), {}).update(numbers)
        own["status"] = result.status
        # a log may have numbers of the same names, as a scheduled learning_rate has
        rows += [{**own, "step": step, **steps[step], **own} for step in sorted(steps)]
    return rows


def as_json(found: Found) -> dict[str, Any]:
    """Returns all numbers for ``--json``; numbers that aren't finite are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {str(key): plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    choices: dict[str, Choice] = {one.name: one.choice for one in found.summaries}
    return plain(
        {
            "answers": found.sentences,
            "not_tested": found.untested,
            "metric": found.metric,
            "target": found.target,
            "final": {one.name: one.final for one in found.summaries},
            "failed": {one.name: one.failed for one in found.summaries},
            "choices": {name: asdict(one) for name, one in choices.items()},
            "differences": [asdict(one) for one in found.differences],
            "until_target": {
                one.name: {"steps": asdict(one.steps), "tokens": asdict(one.tokens), "seconds": asdict(one.seconds)}
                for one in found.summaries
            },
            "sweep": found.scores,
            "dropped": list(found.plan.dropped),
        }
    )


def write_json(found: Found, file: Path) -> None:
    write_whole(file, json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
