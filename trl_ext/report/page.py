"""The page: numbers -> charts (``charts.py``) -> one HTML file with everything in it (``page.html.jinja``)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from . import charts
from .definitions import DEFINITIONS, PAPER
from .groups import Group, differences
from .read_run import Run

HOW_TO_LOG = "Not in this run's folder. CurvatureGRPOConfig(interference_every=10), the default, logs it."
NOT_LOGGED = "Nothing of it is in this run's log."

# id -> heading, a sentence for a newcomer, the metrics of each chart
SECTIONS: dict[str, tuple[str, str, list[tuple[str, ...]]]] = {
    "learning": (
        "Did it learn?",
        "Reward of the sampled answers, and accuracy on problems never trained on, against optimizer steps. The shade "
        "behind is the training phase: green 1, yellow 2, red 3.",
        [("reward", "eval_accuracy"), ("grad_norm",)],
    ),
    "normalisation": (
        "What the normalisation did",
        "A group's rewards are divided by its scale. A group whose answers all got the same reward is dead and teaches "
        "nothing. Advantages are what is left to learn from.",
        [
            ("normalization/scale_mean", "normalization/scale_min", "normalization/scale_max"),
            ("normalization/zero_variance_frac",),
            ("normalization/advantage_abs_mean", "normalization/advantage_max"),
        ],
    ),
    "interference": (
        "Do the prompts get in one another's way?",
        "The cosine of two prompts' gradients: near 0 they leave one another alone, below 0 one undoes the other. "
        "Reliability says how much of a prompt's gradient is signal: where it is low, chance pulls cosines to 0.",
        [
            ("interference/cos_mean", "interference/conflict_frac", "interference/reliability"),
            ("interference/cos_std", "interference/reliability"),
            ("interference/near_orthogonal_frac", "interference/reliability"),
        ],
    ),
    "curvature": (
        "Does the std follow the curvature?",
        "The theory says that the std of a group's rewards, sigma, tracks the curvature of its objective, and that "
        "below C = 1 dividing by it converges faster.",
        [("curvature/speedup_constant",), ("curvature/directional_corr", "curvature/fisher_variance_corr")],
    ),
    "theory": (
        "The theory's constants",
        "How far the theorem's assumptions hold: the bound M, the share of pairs for which no M does, and how unlike "
        "the prompts are. Dashed: what the paper reports.",
        [("theory/m_bound_p95",), ("theory/negative_pairs_frac",), ("theory/r1", "theory/r2")],
    ),
    "compute": (
        "Where the work went",
        "Sequences without a gradient don't run. Tokens that did, the share of the backbone's work that was saved, and "
        "the seconds of each stage of a step.",
        [
            ("compute/tokens_run",),
            ("compute/sequences_skipped_frac", "compute/tokens_skipped_frac", "compute/flops_saved_frac"),
            (
                "compute/seconds_generation",
                "compute/seconds_rewards",
                "compute/seconds_log_probs",
                "compute/seconds_training",
            ),
        ],
    ),
}
FROM_INTERFERENCE = ("interference", "curvature", "theory")

Part = dict[str, Any]


def _chart(figure: Any, height: int = 380, **more: Any) -> Part:
    return {"chart": Markup(charts.as_html(figure, height)), **more}


def _curves(section: str, numbers: Sequence[dict[str, Any]], groups: Sequence[Group]) -> list[Part]:
    parts: list[Part] = []
    drawn: set[tuple[str, ...]] = set()  # reliability stands beside several curves, and is drawn once for several runs
    for names in SECTIONS[section][2]:
        one = len(numbers) == 1
        for shown in [names] if one else [(name,) for name in names if (name,) not in drawn]:
            drawn.add(shown)
            if one:
                figure = charts.curves_of_a_run(shown, numbers[0]["curves"][section])
            else:
                figure = charts.curves_of_groups(shown[0], groups)
            if figure is None:
                continue
            if one and section == "learning":
                charts.shade_phases(figure, numbers[0]["phases"])
            if "curvature/speedup_constant" in shown:
                charts.reference_line(figure, 1.0, "C = 1")
            for name in shown:
                for where, value in numbers[0]["paper"].get(name, {}).items():
                    charts.reference_line(figure, value, f"paper, {where}: {value:g}")
            parts.append(_chart(figure))
    return parts


def _interference(numbers: dict[str, Any], whose: str) -> list[Part]:
    maps, logged = numbers["heatmaps"], numbers["logged_interference_steps"]
    if not maps:
        return []
    note = f"{len(maps)} of {logged} logged steps have a heatmap here"
    note += " (the others have fewer than two live prompts, or were left out evenly)" if logged > len(maps) else ""
    note += f"; of a step at most {numbers['most_prompts']} prompts, those with the largest gradients."
    pairs = [(kind, pair) for kind in ("conflict", "agree") for pair in numbers["pairs"][kind]]
    return [
        _chart(charts.heatmap(maps), 620, heading=f"{whose}Cosines of a logged step", note=note),
        _chart(charts.histogram(numbers["histogram"]), heading=f"{whose}How cosines are spread"),
        {"heading": f"{whose}Pairs that conflict and that agree most", "pairs": pairs},
    ]


def _sigma_and_curvature(numbers: dict[str, Any], whose: str) -> list[Part]:
    points = numbers["sigma_and_curvature"]
    heading = f"{whose}Sigma against measured curvature, each prompt of each logged step"
    return [_chart(charts.sigma_and_curvature(points), heading=heading)] if points else []


def build_page(runs: Sequence[Run], groups: Sequence[Group], numbers: Sequence[dict[str, Any]], command: str) -> str:
    """The whole file. ``numbers`` are ``report_numbers`` of the runs."""
    sections = []
    for section, (heading, sentence, _) in SECTIONS.items():
        parts = _curves(section, numbers, groups)
        for one in numbers:
            whose = f"{one['run']}: " if len(numbers) > 1 else ""
            if section == "learning":
                parts += [{"note": whose + note} for note in one["notes"]]
            if section == "interference":
                parts += _interference(one, whose)
            if section == "curvature":
                parts += _sigma_and_curvature(one, whose)
        if not parts:
            parts = [{"note": HOW_TO_LOG if section in FROM_INTERFERENCE else NOT_LOGGED}]
        sections.append({"id": section, "heading": heading, "sentence": sentence, "parts": parts})
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=", ".join(run.name for run in runs),
        numbers=numbers,
        differences=differences(runs),
        sections=sections,
        definitions=DEFINITIONS,
        paper=PAPER,
        plotly_script=Markup(get_plotlyjs()),
        command=command,
    )
