"""What the lab's cells come to: gains, what predicts them, tables. Pure functions of cells; intervals are 95%."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .lab_cells import DIALS, STRUCTURE, Cell, start_constant

OVERLAPS = (0.0, 0.25, 0.5, 0.75, 0.9)
RESAMPLES = 2000
GAIN_BY_CONSTANT = (0.0, 0.7, 0.9, 1.1, math.inf)


def gains_of(cells: Sequence[Cell], method: str = "std") -> tuple[np.ndarray, int, int]:
    """Returns the gains in area over ``mean``, and in how many cells the whole interval is above 0, and below."""
    found = np.array([cell.area_gain(method) for cell in cells])
    return found[:, 0], int((found[:, 1] > 0).sum()), int((found[:, 2] < 0).sum())


def by_constant(cells: Sequence[Cell]) -> list[str]:
    """The table that decides: gain in area by group size and by the C that the first batches show."""
    edges = GAIN_BY_CONSTANT
    spans = list(pairwise(edges))
    heads = [
        f"below {high:g}" if not low else f"{low:g} on" if high == math.inf else f"{low:g} to {high:g}"
        for low, high in spans
    ]
    lines = [f"| answers a prompt | C {' | C '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for group in sorted({cell.setting["group"] for cell in cells}, key=lambda group: group or math.inf):
        texts = []
        for low, high in spans:
            at = [c for c in cells if c.setting["group"] == group and low <= start_constant(c.setting) < high]
            if not at:
                texts.append("")
                continue
            gains, better, worse = gains_of(at)
            texts.append(f"{gains.mean():+.3f} ({better}, {worse} of {len(at)})")
        lines.append(f"| {'endless' if not group else f'{group:g}'} | {' | '.join(texts)} |")
    return lines


# Predictors


@dataclass(frozen=True)
class Fit:
    """A straight line, y = slope x + intercept, over cells; (estimate, low, high) by a bootstrap over cells."""

    cells: int
    slope: tuple[float, float, float]
    intercept: tuple[float, float, float]
    explained: float  # R^2 of that line
    as_it_is: float  # R^2 of y = x: what slope 1 and intercept 0 would explain; below 0: worse than a constant


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Fits a line; None with fewer than ten cells that have both values."""
    x, y = np.asarray(x), np.asarray(y)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 10 or np.ptp(x) == 0:
        return None
    random = np.random.default_rng(0)
    lines = []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(x), size=len(x))
        if np.ptp(x[drawn]) > 0:
            lines.append(np.polyfit(x[drawn], y[drawn], 1))
    low, high = np.quantile(lines, [0.025, 0.975], axis=0)
    slope, intercept = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    return Fit(
        len(x),
        (slope, low[0], high[0]),
        (intercept, low[1], high[1]),
        1 - ((y - slope * x - intercept) ** 2).sum() / spread,
        1 - ((y - x) ** 2).sum() / spread,
    )


# -> tables


def by_dial(cells: Sequence[Cell]) -> list[str]:
    """Gain in area at each level of each dial, exact and sampled gradients apart; in brackets the share of what is to
    be gained: 1 - mean's area."""
    lines = [
        "| dial | | exact: gain in area (of what is left) | better, worse, cells | sampled | better, worse, cells |",
        "|---|---|---|---|---|---|",
    ]
    for dial in DIALS:
        for level in sorted({cell.setting[dial] for cell in cells}):
            texts = []
            for exact in (True, False):
                at = [c for c in cells if c.setting[dial] == level and (c.setting["group"] == 0) == exact]
                if not at:
                    texts += ["", ""]
                    continue
                gains, better, worse = gains_of(at)
                left = np.mean([1 - cell.value("area") for cell in at])
                texts += [f"{gains.mean():+.3f} ({gains.mean() / left:.0%})", f"{better}, {worse}, {len(at)}"]
            name = "exact" if dial == "group" and not level else f"{level:g}"
            lines.append(f"| {dial} | {name} | " + " | ".join(texts) + " |")
    return lines


PREDICTORS = {  # of log(T_std / T_mean)
    "log C, exact": lambda cell: math.log(cell.value("c_steps")),
    "log C, logged": lambda cell: math.log(cell.value("c_logged_steps")),
    "log C, exact, of the slowest run": lambda cell: math.log(cell.value("c_slowest")),
    "variation of sigma over prompts, of the slowest run": lambda cell: cell.value("variation_prompts"),
    "variation of sigma over time, of the slowest run": lambda cell: cell.value("variation_time"),
}


def predictors(cells: Sequence[Cell]) -> list[str]:
    """Lines of log(T_std / T_mean) on each predictor."""
    lines = [
        "| gradients, rates | predictor | cells | slope | intercept | R^2 | R^2 of slope 1, intercept 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in sorted({cell.setting["group"] for cell in cells}):
        chosen = [cell for cell in cells if cell.setting["group"] == group]
        name = f"G = {group:g}" if group else "exact"
        small = fit([math.log(c.value("c_slowest")) for c in chosen], [c.flow_ratio() for c in chosen])
        lines.append(_fit_line(f"{name}, small steps, 3 : 8", "log C, exact", len(chosen), small))
        for predictor, read in PREDICTORS.items():
            line = fit([read(c) for c in chosen], [c.steps_ratio() for c in chosen])
            lines.append(_fit_line(f"{name}, best", predictor, len(chosen), line))
    return lines


def _fit_line(name: str, predictor: str, cells: int, line: Fit | None) -> str:
    if line is None:
        return f"| {name} | {predictor} | too few | | | | |"
    texts = [f"{e:.2f} [{low:.2f}, {high:.2f}]" for e, low, high in (line.slope, line.intercept)]
    own = f"{line.as_it_is:.2f}" if predictor.startswith("log C") else ""
    return f"| {name} | {predictor} | {line.cells} of {cells} | {' | '.join(texts)} | {line.explained:.2f} | {own} |"


REGRESSORS = {
    "log2 G": lambda cell: math.log2(cell.setting["group"]),
    "C at the start": lambda cell: start_constant(cell.setting),
    "their product": lambda cell: math.log2(cell.setting["group"]) * start_constant(cell.setting),
    **{
        f"overlap {level:g}": lambda cell, level=level: float(cell.setting["overlap"] == level)
        for level in OVERLAPS[1:]
    },
}
OVERLAP_DUMMIES = [name for name in REGRESSORS if name.startswith("overlap")]


def explained(cells: Sequence[Cell]) -> list[str]:
    """R^2 of linear regressions of the gain in area on sets of ``REGRESSORS``, over settings with sampled answers."""
    sampled = [cell for cell in cells if cell.setting["group"] > 0]
    y = np.array([cell.area_gain()[0] for cell in sampled])
    columns = {name: np.array([read(cell) for cell in sampled]) for name, read in REGRESSORS.items()}
    lines = ["| gain in area on | R^2 |", "|---|---|"]
    three = ["log2 G", "C at the start", "their product"]
    for names in (OVERLAP_DUMMIES, three[1:2], three[:1], three, [*three, *OVERLAP_DUMMIES]):
        x = np.column_stack([np.ones(len(y)), *(columns[name] for name in names)])
        left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        told = ", ".join(dict.fromkeys("overlap" if name in OVERLAP_DUMMIES else name for name in names))
        lines.append(f"| {told} | {1 - (left**2).sum() / ((y - y.mean()) ** 2).sum():.2f} |")
    return lines


def rates(cells: Sequence[Cell]) -> list[str]:
    """Compares the best rates of ``mean`` and ``std``, and counts where the largest rate won."""
    lines = [
        "| | cells | best rate of `mean` / `std`: median [10 %, 90 %] | largest rate won: steps, area |",
        "|---|---|---|---|",
    ]
    for name, exact in (("exact", True), ("sampled", False)):
        at = [cell for cell in cells if (cell.setting["group"] == 0) == exact]
        ratios = [cell.rows["mean"]["rate_area"] / cell.rows["std"]["rate_area"] for cell in at]
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        edges = [
            sum(any(cell.rows[m][f"edge_{kind}"] for m in ("mean", "std")) for cell in at) for kind in ("steps", "area")
        ]
        lines.append(f"| {name} | {len(at)} | {middle:.2f} [{low:.2f}, {high:.2f}] | {edges[0]}, {edges[1]} |")
    return lines


def assumption_table(cells: Sequence[Cell]) -> list[str]:
    """Assumption 4 and 5, and curvature against sigma, by overlap: medians over the cells with exact gradients."""
    names = {
        "cos_std": "std of cosines",
        "near_orthogonal_frac": "near-orthogonal",
        "violated_frac": "pairs that violate 4",
        "m_bound_p95": "M (95 % of the others)",
        "r1": "R1",
        "r2": "R2",
        "curvature_corr": "corr(abs curvature, sigma)",
        "curvature_negative_frac": "curvature < 0",
        "curvature_over_sigma": "most curvature / sigma",
    }
    lines = [f"| overlap | when | {' | '.join(names.values())} |", "|---|---|" + "---|" * len(names)]
    exact = [cell for cell in cells if cell.setting["group"] == 0]
    for overlap in sorted({cell.setting["overlap"] for cell in exact}):
        for when in ("start", "half"):
            texts = []
            for name in names:
                values = [c.value(f"{when}_{name}") for c in exact if c.setting["overlap"] == overlap]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    texts.append(f"{np.nanmedian(values):.3g}".replace("nan", ""))
            lines.append(f"| {overlap:g} | {when} | {' | '.join(texts)} |")
    return lines


def methods_table(cells: Sequence[Cell]) -> list[str]:
    """Each method's area less mean's, by group size: over the slice, and how often an interval leaves 0."""
    lines = ["| method | G | area less `mean`'s: least, mean, most | better, worse, cells |", "|---|---|---|---|"]
    for name in [name for name in cells[0].rows if name != "mean"]:
        for group in sorted({cell.setting["group"] for cell in cells}):
            at = [cell for cell in cells if cell.setting["group"] == group]
            gains, better, worse = gains_of(at, name)
            told = ", ".join(f"{value:+.3f}" for value in (gains.min(), gains.mean(), gains.max()))
            lines.append(f"| `{name}` | {group:g} | {told} | {better}, {worse}, {len(at)} |")
    return lines


def adaptive_table(cells: Sequence[Cell]) -> list[str]:
    """``adaptive`` less ``std``, setting by setting."""
    lines = ["| overlap, spread, pass rate, G, flips | `adaptive` less `std` |", "|---|---|"]
    for cell in cells:
        gain, low, high = cell.area_gain("adaptive", "std")
        place = ", ".join(f"{cell.setting[dial]:g}" for dial in DIALS)
        lines.append(f"| {place} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |")
    return lines


def structures_table(cells: Sequence[Cell]) -> list[str]:
    """std less mean in other policies."""
    usual = {"prompts": 64.0, "answers": 8.0, "features": 3.0, "shared_features": 32.0}
    lines = ["| policy | gain in area, exact | gain in area, G = 8 | better, worse, cells |", "|---|---|---|---|"]
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        other = {name: cell.setting[name] for name in STRUCTURE if cell.setting[name] != usual[name]}
        kinds.setdefault(", ".join(f"{name} = {value:g}" for name, value in other.items()), []).append(cell)
    for kind, at in kinds.items():
        texts = []
        for exact in (True, False):
            gains = [c.area_gain()[0] for c in at if (c.setting["group"] == 0) == exact]
            texts.append(f"{np.mean(gains):+.3f}" if gains else "")
        _, better, worse = gains_of(at)
        lines.append(f"| {kind} | {' | '.join(texts)} | {better}, {worse}, {len(at)} |")
    return lines


def tables(cells: Sequence[Cell]) -> str:
    """``lab.md``."""
    parts: Mapping[str, list[Cell]] = {
        part: [cell for cell in cells if cell.part == part] for part in ("map", "methods", "structures")
    }
    sections = [
        ("Gain of `std` over `mean`, by dial", by_dial(parts["map"])),
        (
            "Gain of `std` over `mean`, by group size and C at the start (better, worse of cells)",
            by_constant(parts["map"]),
        ),
        ("Best rates", rates(parts["map"])),
        ("What predicts T_std / T_mean", predictors(parts["map"])),
        ("What explains the gain", explained(parts["map"])),
        ("The assumptions", assumption_table(parts["map"])),
        ("Other methods", methods_table(parts["methods"])),
        ("`adaptive`", adaptive_table(parts["methods"])),
        ("Other policies", structures_table(parts["structures"])),
    ]
    return "\n".join(line for title, lines in sections for line in (f"## {title}", "", *lines, ""))
