"""What the lab's cells come to: gains, what predicts them, tables. Pure functions of cells; intervals are 95%."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from examples.ablation.curves import Interval
from examples.ablation.tables import markdown, sections

from .lab_cells import DIALS, Cell, by_gradients, by_rewards, levels, own_std_at_start, where
from .log_linear import Setting

OVERLAPS = (0.0, 0.25, 0.5, 0.75, 0.9)
RESAMPLES = 2000
COUNTS = "better, worse, cells"


def gains_of(cells: Sequence[Cell], method: str = "std") -> tuple[np.ndarray, str]:
    """Returns the gains in area over ``mean``, and the ``COUNTS``: in how many cells the whole interval is above 0, in
    how many below, and of how many."""
    found = [cell.area_gain(method) for cell in cells]
    better, worse = sum(one.low > 0 for one in found), sum(one.high < 0 for one in found)
    return np.array([one.estimate for one in found]), f"{better}, {worse}, {len(found)}"


# Predictors


@dataclass(frozen=True)
class Fit:
    """A straight line, y = slope x + intercept, over cells; intervals by a bootstrap over cells."""

    cells: int
    slope: Interval
    intercept: Interval
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
    draws = [random.integers(len(x), size=len(x)) for _ in range(RESAMPLES)]
    lines = [np.polyfit(x[drawn], y[drawn], 1) for drawn in draws if np.ptp(x[drawn]) > 0]
    ends = np.quantile(lines, [0.025, 0.975], axis=0).T
    slope, intercept = (Interval(one, *end) for one, end in zip(np.polyfit(x, y, 1), ends, strict=True))
    line = slope.estimate * x + intercept.estimate
    return Fit(len(x), slope, intercept, r_squared(y, y - line), r_squared(y, y - x))


def r_squared(y: np.ndarray, left: np.ndarray) -> float:
    """The share of the variation of ``y`` that isn't in what is ``left`` of it."""
    return 1 - (left**2).sum() / ((y - y.mean()) ** 2).sum()


# -> tables


def by_dial(cells: Sequence[Cell]) -> list[str]:
    """Gain in area by the answers to a prompt, and at each level of the other dials with sampled answers.

    Right and flipped rewards are apart. In brackets the share of what is to be gained: 1 - mean's area.
    """
    _, sampled = by_gradients(cells)
    rows = []
    for dial in ("group", "pass_rate", "spread", "overlap"):
        at_dial = cells if dial == "group" else sampled
        for level in levels(at_dial, dial):
            texts = []
            for at in by_rewards(where(at_dial, **{dial: level})):
                gains, counts = gains_of(at)
                left = np.array([1 - cell.value("area") for cell in at])
                texts += [f"{gains.mean():+.3f} ({gains.mean() / left.mean():.0%})", counts] if at else ["", ""]
            rows.append([dial, "exact" if dial == "group" and not level else f"{level:g}", *texts])
    return markdown(["dial", "", "right rewards: gain in area (of what is left)", COUNTS, "flipped", COUNTS], rows)


PREDICTORS: dict[str, Callable[[Cell], float]] = {  # of log(T_std / T_mean)
    "log C, exact": lambda cell: math.log(cell.value("c_steps")),
    "log of 8/3 of the groups' own std": lambda cell: math.log(cell.value("own_std_8_3_steps")),
    "log C, exact, of the slowest run": lambda cell: math.log(cell.value("c_slowest")),
    "variation of sigma over prompts, of the slowest run": lambda cell: cell.value("variation_prompts"),
    "variation of sigma over time, of the slowest run": lambda cell: cell.value("variation_time"),
}


def predictors(cells: Sequence[Cell]) -> list[str]:
    """Lines of log(T_std / T_mean) on each predictor."""
    rows = []
    for group in levels(cells, "group"):
        chosen = where(cells, group=group)
        slow = (", small steps, 3 : 8", "log C, exact", PREDICTORS["log C, exact, of the slowest run"], Cell.flow_ratio)
        best = [(", best", name, read, Cell.steps_ratio) for name, read in PREDICTORS.items()]
        for kind, name, read, ratio in (slow, *best):
            line = fit([read(cell) for cell in chosen], [ratio(cell) for cell in chosen])
            texts = ["too few", "", "", "", ""]
            if line is not None:
                own = f"{line.as_it_is:.2f}" if name.startswith("log ") else ""
                counted = f"{line.cells} of {len(chosen)}"
                texts = [counted, f"{line.slope:.2f}", f"{line.intercept:.2f}", f"{line.explained:.2f}", own]
            rows.append([(f"G = {group:g}" if group else "exact") + kind, name, *texts])
    head = ["gradients, rates", "predictor", "cells", "slope", "intercept", "R^2", "R^2 of slope 1, intercept 0"]
    return markdown(head, rows)


def explained(cells: Sequence[Cell]) -> list[str]:
    """R^2 of linear regressions of the gain in area on sets of variables, with sampled answers and right rewards."""
    sampled, _ = by_rewards(by_gradients(cells)[1])
    y = np.array([cell.area_gain().estimate for cell in sampled])
    log_group = np.log2([cell.setting.group for cell in sampled])
    constant = np.array([own_std_at_start(cell.setting) for cell in sampled])
    overlap = np.array([[cell.setting.overlap == level for level in OVERLAPS[1:]] for cell in sampled])
    three = {"log2 G": log_group, "own std at the start": constant, "their product": log_group * constant}
    alone = [{name: three[name]} for name in ("own std at the start", "log2 G")]
    rows = []
    for columns in ({"overlap": overlap}, *alone, three, {**three, "overlap": overlap}):
        x = np.column_stack([np.ones(len(y)), *columns.values()])
        rows.append([", ".join(columns), f"{r_squared(y, y - x @ np.linalg.lstsq(x, y, rcond=None)[0]):.2f}"])
    return markdown(["gain in area on", "R^2"], rows)


def rates(cells: Sequence[Cell]) -> list[str]:
    """Compares the best rates of ``mean`` and ``std``, and counts where the largest rate won."""
    rows = []
    for name, at in zip(("exact", "sampled"), by_gradients(cells), strict=True):
        ratios = [cell.rows["mean"]["rate_area"] / cell.rows["std"]["rate_area"] for cell in at]
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        edges = [sum(any(c.rows[m][edge] for m in ("mean", "std")) for c in at) for edge in ("edge_steps", "edge_area")]
        rows.append([name, f"{len(at)}", f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{edges[0]}, {edges[1]}"])
    ratio = "best rate of `mean` / `std`: median [10 %, 90 %]"
    return markdown(["", "cells", ratio, "largest rate won: steps, area"], rows)


ASSUMED = {
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


def assumption_table(cells: Sequence[Cell]) -> list[str]:
    """Assumption 4 and 5, and curvature against sigma, by overlap: medians over the cells with exact gradients."""
    exact, _ = by_gradients(cells)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a median of no cells: nan, left empty
        for overlap in levels(exact, "overlap"):
            for when in ("start", "half"):
                at = where(exact, overlap=overlap)
                medians = [np.nanmedian([cell.value(f"{when}_{name}") for cell in at]) for name in ASSUMED]
                rows.append([f"{overlap:g}", when, *(f"{median:.3g}".replace("nan", "") for median in medians)])
    return markdown(["overlap", "when", *ASSUMED.values()], rows)


def methods_table(cells: Sequence[Cell]) -> list[str]:
    """Each method's area less mean's over the slice, by flips and group size, and how often an interval leaves 0."""
    groups = levels(cells, "group")
    rows = []
    for name in [name for name in cells[0].rows if name != "mean"]:
        for noise in levels(cells, "noise"):
            texts = []
            for group in groups:
                gains, counts = gains_of(where(cells, group=group, noise=noise), name)
                texts += [", ".join(f"{value:+.3f}" for value in (gains.min(), gains.mean(), gains.max())), counts]
            rows.append([f"`{name}`", f"{noise:g}", *texts])
    heads = [head for group in groups for head in (f"G = {group:g}: least, mean, most", COUNTS)]
    return markdown(["area less `mean`'s", "flips", *heads], rows)


def structures_table(cells: Sequence[Cell]) -> list[str]:
    """std less mean in other policies."""
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        other = {f.name: getattr(cell.setting, f.name) for f in fields(Setting) if f.name not in DIALS}
        named = [f"{name} = {value:g}" for name, value in other.items() if value != getattr(Setting, name)]
        kinds.setdefault(", ".join(named), []).append(cell)
    rows = []
    for kind, at in kinds.items():
        texts = [f"{gains_of(some)[0].mean():+.3f}" if some else "" for some in by_gradients(at)]
        rows.append([kind, *texts, gains_of(at)[1]])
    return markdown(["policy", "gain in area, exact", "gain in area, G = 8", COUNTS], rows)


TABLES = [  # title, part of the cells, table
    ("Gain of `std` over `mean`, by dial", "map", by_dial),
    ("Best rates", "map", rates),
    ("What predicts T_std / T_mean", "map", predictors),
    ("What explains the gain", "map", explained),
    ("The assumptions", "map", assumption_table),
    ("Other methods", "methods", methods_table),
    ("Other policies", "structures", structures_table),
]


def tables(cells: Sequence[Cell]) -> str:
    """``lab.md``."""
    return sections({title: table([cell for cell in cells if cell.part == part]) for title, part, table in TABLES})
