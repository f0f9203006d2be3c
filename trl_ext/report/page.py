"""Builds the page: numbers -> charts (``charts.py``) -> one HTML file with everything in it (``page.html.jinja``).

It holds plotly's script gzipped and unpacks it when it is opened: 2 MB in place of 5.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trl_ext.options import SCALE_REWARDS_METHOD

from . import charts
from .compare_runs import compare_runs
from .completions import SampledAnswer
from .configuration import CONFIGURATION
from .definitions import DEFINITIONS, PAPER
from .groups import Group, differences
from .numbers import Pair, ReportNumbers
from .read_run import Run
from .run_files import Configuration
from .sections import MAIN_CHART, SECTIONS, THEORY, Curves
from .what_if_table import Method

SHOWN_PAIRS = 3  # of each kind


@dataclass(frozen=True)
class Part:
    """A chart, a table or a note of a section; ``figure``: plotly's JSON. ``shape``: "tall", "wide" or "third", of the
    page's columns."""

    title: str = ""
    note: str = ""
    shape: str = ""
    figure: str = ""
    height: int = 0
    pairs: list[tuple[str, Pair]] = field(default_factory=list)
    methods: list[tuple[str, Method]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    completions: dict[int, list[SampledAnswer]] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownSection:
    """``small``: takes half of the page's width."""

    id: str
    heading: str
    sentence: str
    parts: list[Part]
    small: bool


def _chart(figure: go.Figure, title: str, height: int = charts.HEIGHT, *, shape: str = "", note: str = "") -> Part:
    return Part(title, note, shape, Markup(charts.as_json(figure, height)), height)


def _curves(section: str, numbers: Sequence[ReportNumbers], groups: Sequence[Group]) -> list[Part]:
    logged = [name for one in numbers for name in one.curves[section]]
    chosen = [chart.find(logged) for chart in SECTIONS[section].curves]
    chosen = [chart for chart in chosen if not chart.pattern or len(chart.metrics) > 1]
    zero: list[str] = []
    if len(numbers) == 1:
        zero = [chart.title for chart in chosen if charts.always_zero(chart, numbers[0].curves[section])]
        chosen = [chart for chart in chosen if chart.title not in zero]
        parts = _curves_of_a_run(section, numbers[0], chosen)
    else:
        parts = _curves_of_groups(chosen, groups)
    if len(parts) % 3 == 0:
        parts = [replace(part, shape="third") for part in parts]
    return [*parts, Part(note=f"0 throughout: {', '.join(zero)}.", shape="wide")] if zero else parts


def _curves_of_a_run(section: str, numbers: ReportNumbers, chosen: Sequence[Curves]) -> list[Part]:
    parts = []
    clip = numbers.config.get("max_grad_norm")
    for chart in chosen:
        if "grad_norm" in chart.metrics and isinstance(clip, int | float) and clip > 0:
            chart = replace(chart, reference=((float(clip), f"clipped at {clip:g}"),))
        figure = charts.curves_of_a_run(chart, numbers.curves[section], numbers.paper)
        if figure is not None:
            parts.append(_chart(figure, chart.title))
    return parts


def _curves_of_groups(chosen: Sequence[Curves], groups: Sequence[Group]) -> list[Part]:
    titles = [(chart, name, f"{chart.title}: {label}") for chart in chosen for name, label in chart.metrics.items()]
    figures = [(charts.curves_of_groups(chart, name, groups), title) for chart, name, title in titles]
    return [_chart(figure, title) for figure, title in figures if figure is not None]


def _interference(numbers: ReportNumbers, whose: str) -> list[Part]:
    maps, logged = numbers.heatmaps, numbers.logged_interference_steps
    if not maps or numbers.histogram is None:
        return []
    left_out = " (the others have fewer than two live prompts, or were left out evenly)" if logged > len(maps) else ""
    note = (
        f"{len(maps)} of {logged} logged steps have a heatmap here{left_out}; of a step at most "
        f"{numbers.most_prompts} prompts, those with the largest gradients. Hatched: below 0 by more than twice the "
        "sketch's error."
    )
    pairs = [(kind, pair) for kind, found in numbers.pairs.items() for pair in found[:SHOWN_PAIRS]]
    return [
        _chart(charts.heatmap(maps), f"{whose}Cosines of a logged step", 500, note=note, shape="tall"),
        _chart(charts.histogram(numbers.histogram), f"{whose}How cosines are spread"),
        Part(f"{whose}Pairs that conflict and that agree most", pairs=pairs),
    ]


def _what_if(numbers: ReportNumbers, whose: str) -> list[Part]:
    table = numbers.what_if
    if table is None:
        return []
    absent: dict[str, list[str]] = {}
    for name, (_, reason) in table.absent.items():
        absent.setdefault(reason, []).append(name)
    remarks = [*table.remarks(), *(f"Not told: {', '.join(names)} ({reason})." for reason, names in absent.items())]
    title = f"{whose}Against {table.used or 'the step taken'}"
    rated = any(one.rate is not None for one in table.methods.values())
    chart = [_chart(charts.what_if(table.methods), f"{whose}Direction and rate", 340, shape="tall")] if rated else []
    return [*chart, Part(title, shape="tall", methods=table.by_cosine, remarks=remarks)]


def _noise(numbers: ReportNumbers, whose: str) -> list[Part]:
    noise = numbers.what_if.noise if numbers.what_if is not None else None
    if noise is None:
        return []
    note = (
        f"{whose}With as many rollouts, noise is least at {noise.advised:.1f} answers to a prompt "
        f"({noise.low:.1f} to {noise.high:.1f}, 90 % by resampling the {noise.steps} steps). That is noise "
        "alone: fewer answers also make more groups whose answers are all alike."
    )
    return [Part(note=note, shape="wide")]


def _learning(numbers: ReportNumbers, whose: str) -> list[Part]:
    return [Part(note=whose + note, shape="wide") for note in numbers.notes]


def _parts(numbers: ReportNumbers, whose: str) -> list[Part]:
    if not numbers.parts:
        return []
    return [_chart(charts.parts(numbers.parts), f"{whose}Share and cosine by part", 280)]


def _tasks(numbers: ReportNumbers, whose: str) -> list[Part]:
    if numbers.tasks is None:
        return []
    chart = _chart(charts.tasks(numbers.tasks), f"{whose}Task against task", 340, shape="tall")
    return [*(Part(note=whose + text, shape="wide") for text in numbers.tasks.told), chart]


def _curvature(numbers: ReportNumbers, whose: str) -> list[Part]:
    if not numbers.sigma_and_curvature:
        return []
    figure = charts.sigma_and_curvature(numbers.sigma_and_curvature)
    return [_chart(figure, f"{whose}Sigma and curvature of each prompt")]


def _completions(numbers: ReportNumbers, whose: str) -> list[Part]:
    by_step: dict[int, list[SampledAnswer]] = {}
    for row in numbers.completions:
        by_step.setdefault(row.step, []).append(row)
    return [Part(f"{whose}Sampled answers", shape="wide", completions=by_step)] if by_step else []


# what a section shows of a run besides curves
OWN = {
    "learning": _learning,
    "what_if": _what_if,
    "noise": _noise,
    "interference": _interference,
    "parts": _parts,
    "tasks": _tasks,
    "curvature": _curvature,
    "completions": _completions,
}


def main_chart(numbers: Sequence[ReportNumbers], groups: Sequence[Group]) -> Part | None:
    """Reward and held-out score; of several runs the held-out score alone, where all have it."""
    if len(numbers) == 1:
        figure = charts.curves_of_a_run(MAIN_CHART, numbers[0].curves["main"], {})
        return None if figure is None else _chart(figure, MAIN_CHART.title, charts.LARGE)
    # lower, so that the answers of two runs fit on the first screen
    for name in ("eval_accuracy", "eval_reward", "reward"):
        if all(name in one.curves["main"] for one in numbers):
            figure = charts.curves_of_groups(MAIN_CHART, name, groups)
            label = MAIN_CHART.metrics[name].capitalize()
            return None if figure is None else _chart(figure, label, charts.MIDDLE)
    return None


def _section(name: str, numbers: Sequence[ReportNumbers], groups: Sequence[Group]) -> ShownSection | None:
    """None where the runs have nothing of it."""
    own: list[Part] = []
    for one in numbers:
        own += OWN[name](one, f"{one.run}: " if len(numbers) > 1 else "") if name in OWN else []
    curves = _curves(name, numbers, groups)
    first = name in ("interference", "what_if")  # what is most looked at stands before the curves
    parts = own + curves if first else curves + own
    if name == "curvature" and len(parts) == 3 and len(numbers) == 1:
        parts = [replace(part, shape="third") for part in parts]
    if not any(part.figure or part.methods or part.pairs or part.completions or part.note for part in parts):
        return None
    small = len([part for part in parts if part.figure or not part.note]) <= 1 and len(own) < 2
    section = SECTIONS[name]
    return ShownSection(name, section.heading, section.sentence, parts, small and name != "completions")


def configuration(config: Configuration) -> list[tuple[str, str]]:
    """Label and value of the options in the page's box, without those that the run doesn't have."""
    shown = {**config, "model_name_or_path": str(config.get("model_name_or_path") or "").rstrip("/").split("/")[-1]}
    shown["normalization"] = config.get("normalization") or SCALE_REWARDS_METHOD.get(config.get("scale_rewards", ""))
    return [(label, f"{shown[name]}") for label, name in CONFIGURATION.items() if shown.get(name) not in (None, "")]


def template(name: str) -> Template:
    """Returns a page's template, of this folder or of ``trl_ext/ablate``."""
    here = Path(__file__).parent
    loader = FileSystemLoader([here, here.parent / "ablate"])
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader).get_template(name)


def plotly_gzip() -> Markup:
    """Returns plotly's script, compressed, for ``figures.html.jinja``."""
    return Markup(base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode())


def build_page(
    runs: Sequence[Run], groups: Sequence[Group], numbers: Sequence[ReportNumbers], command: str, data: str = ""
) -> str:
    """The HTML file as a text. ``numbers`` are ``report_numbers`` of the runs; ``data``: JSON that others may read."""
    shown = [section for name in SECTIONS if (section := _section(name, numbers, groups)) is not None]
    main = main_chart(numbers, groups)
    sections = [section for section in shown if section.id not in THEORY]
    theory = [section for section in shown if section.id in THEORY]
    in_order = [*([main] if main else []), *(part for one in [*sections, *theory] for part in one.parts)]
    return template("page.html.jinja").render(
        title=", ".join(run.name for run in runs),
        numbers=numbers,
        configurations=[configuration(run.config) for run in runs],
        differences=differences(runs) if all(run.config for run in runs) else [],
        main=main,
        comparison=compare_runs(*runs) if len(runs) == 2 else [],
        sections=sections,
        theory=theory,
        absent=[one.heading for name, one in SECTIONS.items() if name not in {found.id for found in shown}],
        definitions=DEFINITIONS,
        paper=PAPER,
        figures=[part.figure for part in in_order if part.figure],
        plotly_gzip=plotly_gzip(),
        command=command,
        data=data,
    )
