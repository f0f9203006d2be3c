"""Builds the page: numbers -> charts (``charts.py``) -> one HTML file with everything in it (``page.html.jinja``).

It holds plotly's script gzipped and unpacks it when it is opened: 2 MB in place of 5.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trl_ext.options import SCALE_REWARDS_METHOD

from . import charts
from .definitions import DEFINITIONS, PAPER
from .groups import Group, differences
from .read_run import Run
from .sections import FROM_INTERFERENCE, SECTIONS
from .summary import STEADY_BLIND

HOW_TO_LOG = "Not in this run's folder. CurvatureGRPOConfig(interference_every=10), the default, logs it."
HOW_TO = {
    "parts": "Not in this run's folder. CurvatureGRPOConfig(interference_parts=True) logs it.",
    "tasks": "Of datasets with a column task, of two tasks or more.",
    "completions": "No answers were kept in this run's folder.",
}
SHOWN_PAIRS = 3  # of each kind
NOT_LOGGED = "Nothing of it is in this run's log."
# what is shown of a configuration: label -> option
CONFIGURATION = {
    "model": "model_name_or_path",
    "adapter": "adapter",
    "normalization": "normalization",
    "answers to a prompt": "num_generations",
    "answers a step": "generation_batch_size",
    "learning rate": "learning_rate",
    "optimizer": "optim",
    "clipped at": "max_grad_norm",
    "loss": "loss_type",
    "beta": "beta",
    "iterations": "num_iterations",
    "tokens of an answer": "max_completion_length",
    "steps": "max_steps",
    "seed": "seed",
    "processes": "num_processes",
}

Part = dict[str, Any]


class Page:
    """Collects the figures of a page, and numbers them."""

    def __init__(self) -> None:
        self.figures: list[Markup] = []

    def place(self, figure: Any, title: str, height: int = charts.HEIGHT, **more: Any) -> Part:
        self.figures.append(Markup(charts.as_json(figure, height)))
        return {"chart": len(self.figures) - 1, "title": title, "height": height, **more}


def _curves(page: Page, section: str, numbers: Sequence[dict[str, Any]], groups: Sequence[Group]) -> list[Part]:
    parts: list[Part] = []
    logged = [name for one in numbers for name in one["curves"][section]]
    chosen = [chart.find(logged) for chart in SECTIONS[section].curves]
    chosen = [chart for chart in chosen if not chart.pattern or len(chart.metrics) > 1]
    if section == "learning":
        clip = numbers[0]["config"].get("max_grad_norm")
        if len(numbers) == 1 and isinstance(clip, int | float) and clip > 0:
            chosen[1] = replace(chosen[1], reference=((float(clip), f"clipped at {clip:g}"),))
    zero: list[str] = []
    for chart in chosen:
        if len(numbers) == 1 and charts.always_zero(chart, numbers[0]["curves"][section]):
            zero.append(chart.title)
        elif len(numbers) == 1:
            figure = charts.curves_of_a_run(chart, numbers[0]["curves"][section], numbers[0]["paper"])
            if figure is not None:
                if section == "learning" and "reward" in chart.metrics:
                    charts.shade_phases(figure, numbers[0]["phases"])
                parts.append(page.place(figure, chart.title))
        else:
            for name, label in chart.metrics.items():
                figure = charts.curves_of_groups(chart, name, groups)
                if figure is not None:
                    parts.append(page.place(figure, f"{chart.title}: {label}"))
    if len(parts) % 3 == 0:
        for part in parts:
            part["third"] = True
    return [*parts, {"note": f"0 throughout: {', '.join(zero)}.", "wide": True}] if zero else parts


def _interference(page: Page, numbers: dict[str, Any], whose: str) -> list[Part]:
    maps, logged = numbers["heatmaps"], numbers["logged_interference_steps"]
    if not maps:
        return []
    left_out = " (the others have fewer than two live prompts, or were left out evenly)" if logged > len(maps) else ""
    note = (
        f"{len(maps)} of {logged} logged steps have a heatmap here{left_out}; of a step at most "
        f"{numbers['most_prompts']} prompts, those with the largest gradients. Hatched: below 0 by more than twice the "
        "sketch's error."
    )
    pairs = [(kind, pair) for kind in ("conflict", "agree") for pair in numbers["pairs"][kind][:SHOWN_PAIRS]]
    return [
        page.place(charts.heatmap(maps), f"{whose}Cosines of a logged step", 500, note=note, tall=True),
        page.place(charts.histogram(numbers["histogram"]), f"{whose}How cosines are spread"),
        {"title": f"{whose}Pairs that conflict and that agree most", "pairs": pairs},
    ]


def _what_if(page: Page, numbers: dict[str, Any], whose: str) -> list[Part]:
    table = numbers["what_if"]
    if not table or not table["methods"]:
        return []
    rows = sorted(table["methods"].items(), key=lambda item: -item[1]["cos"])
    told = []
    if str(table["optimizer"] or "").startswith(STEADY_BLIND):
        told.append(f"{table['optimizer']} takes no notice of a factor that stays the same.")
    told += [f"One and the same here, but for a learning rate: {', '.join(group)}." for group in table["same"]]
    absent: dict[str, list[str]] = {}
    for name, (_, reason) in table["absent"].items():
        absent.setdefault(reason, []).append(name)
    told += [f"Not told: {', '.join(names)} ({reason})." for reason, names in absent.items()]
    return [
        page.place(charts.what_if(table), f"{whose}Direction and length", 340, tall=True),
        {"title": f"{whose}Against {table['used'] or 'the step taken'}", "methods": rows, "told": told, "tall": True},
    ]


def _noise(numbers: dict[str, Any], whose: str) -> list[Part]:
    noise = (numbers["what_if"] or {}).get("noise")
    if not noise:
        return []
    note = (
        f"{whose}With as many rollouts, noise is least at {noise['advised']:.1f} answers to a prompt "
        f"({noise['low']:.1f} to {noise['high']:.1f}, 90 % by resampling the {noise['steps']} steps). That is noise "
        "alone: fewer answers also make more groups whose answers are all alike."
    )
    return [{"note": note, "wide": True}]


def _own(page: Page, section: str, numbers: dict[str, Any], whose: str) -> list[Part]:
    """What a section shows besides curves."""
    if section == "learning":
        return [{"note": whose + note, "wide": True} for note in numbers["notes"]]
    if section == "interference":
        return _interference(page, numbers, whose)
    if section == "what_if":
        return _what_if(page, numbers, whose)
    if section == "noise":
        return _noise(numbers, whose)
    if section == "parts" and numbers["parts"]:
        return [page.place(charts.parts(numbers["parts"]), f"{whose}Share and cosine by part", 280)]
    if section == "tasks" and numbers["tasks"]:
        found = page.place(charts.tasks(numbers["tasks"]), f"{whose}Task against task", 340, tall=True)
        return [*({"note": whose + told, "wide": True} for told in numbers["tasks"]["told"]), found]
    if section == "curvature" and numbers["sigma_and_curvature"]:
        figure = charts.sigma_and_curvature(numbers["sigma_and_curvature"])
        return [page.place(figure, f"{whose}Sigma and curvature of each prompt")]
    if section == "completions" and numbers["completions"]:
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in numbers["completions"]:
            by_step.setdefault(row["step"], []).append(row)
        return [{"title": f"{whose}Sampled answers", "completions": by_step, "wide": True}]
    return []


def configuration(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of the options in the page's box, without those that the run doesn't have."""
    shown = {**config, "model_name_or_path": str(config.get("model_name_or_path") or "").rstrip("/").split("/")[-1]}
    shown["normalization"] = config.get("normalization") or SCALE_REWARDS_METHOD.get(config.get("scale_rewards", ""))
    return [(label, f"{shown[name]}") for label, name in CONFIGURATION.items() if shown.get(name) not in (None, "")]


def build_page(runs: Sequence[Run], groups: Sequence[Group], numbers: Sequence[dict[str, Any]], command: str) -> str:
    """The HTML file as a text. ``numbers`` are ``report_numbers`` of the runs."""
    page, sections = Page(), []
    for name, section in SECTIONS.items():
        own: list[Part] = []
        for one in numbers:
            own += _own(page, name, one, f"{one['run']}: " if len(numbers) > 1 else "")
        first = name in ("interference", "what_if")  # what is most looked at stands before the curves
        curves = _curves(page, name, numbers, groups)
        parts = own + curves if first else curves + own
        if name == "curvature" and len(parts) == 3 and len(numbers) == 1:
            parts = [{**part, "third": True} for part in parts]
        if not parts:
            parts = [{"note": HOW_TO.get(name, HOW_TO_LOG if name in FROM_INTERFERENCE else NOT_LOGGED)}]
        small = len([part for part in parts if "note" not in part or "chart" in part]) <= 1 and not own[1:]
        more = {"small": small and name not in ("completions",), "empty": "note" in parts[0] and len(parts) == 1}
        sections.append({"id": name, "heading": section.heading, "sentence": section.sentence, "parts": parts, **more})
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=", ".join(run.name for run in runs),
        numbers=numbers,
        configurations=[configuration(run.config) for run in runs],
        differences=differences(runs) if all(run.config for run in runs) else [],
        sections=sections,
        definitions=DEFINITIONS,
        paper=PAPER,
        figures=page.figures,
        plotly_gzip=Markup(base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()),
        command=command,
    )
