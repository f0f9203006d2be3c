"""The lab's measurements: a ``Cell`` for each setting, read from ``cells.csv``, summed up in ``lab.csv``.

``mean`` against ``std``, paired by seed: area is the mean accuracy over all steps, each method at the rate that is best
for it; steps are those to half of the failures, each at the rate that is best for that. Intervals are 95%.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.ablation.curves import mean_interval

from .log_linear import Policies, Setting

DIALS = ("overlap", "spread", "pass_rate", "group", "noise")
STRUCTURE = ("prompts", "answers", "features", "shared_features")
WHOLE = ("group", *STRUCTURE)
FEWEST_STEPS = 3  # below, there is nothing to converge: a step or two solve it
ENOUGH_SEEDS = 0.8


@dataclass(frozen=True)
class Cell:
    """A setting with its methods' rows; values of seeds as arrays."""

    part: str
    setting: dict[str, float]
    rows: dict[str, dict[str, Any]]

    def value(self, name: str) -> float:
        """The mean over seeds of one of ``mean``'s columns; nan where no seed has it."""
        values = self.rows["mean"][name]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def area_gain(self, method: str = "std", reference: str = "mean") -> tuple[float, float, float]:
        """Returns estimate, low end and high end of the gain in area."""
        found = mean_interval(list(self.rows[method]["area"] - self.rows[reference]["area"]))
        return found.estimate, found.low, found.high

    def steps_ratio(self, method: str = "std", reference: str = "mean") -> float:
        """log(T_method / T_reference), a mean over the seeds where both got there; nan where too few did, where
        fewer than three steps were taken, or where no rate was too large."""
        first, second = self.rows[method], self.rows[reference]
        if first["edge_steps"] or second["edge_steps"]:
            return math.nan
        both = np.isfinite(first["steps"]) & np.isfinite(second["steps"])
        if both.mean() < ENOUGH_SEEDS or min(np.median(one["steps"][both]) for one in (first, second)) < FEWEST_STEPS:
            return math.nan
        return float(np.log(first["steps"][both] / second["steps"][both]).mean())

    def flow_ratio(self) -> float:
        """log of T_std / T_mean with small steps, ``std``'s 3/8 of ``mean``'s, as C = 8/3 of sigma has it."""
        first, second = self.rows["std"]["flow_time"], self.rows["mean"]["flow_time"]
        both = np.isfinite(first) & np.isfinite(second)
        return float(np.log(8 / 3 * first[both] / second[both]).mean()) if both.mean() >= ENOUGH_SEEDS else math.nan


def read_cells(path: Path) -> list[Cell]:
    """Reads ``cells.csv``, sorted by setting."""
    found: dict[tuple[Any, ...], Cell] = {}
    with open(path, newline="") as stream:
        for row in csv.DictReader(stream):
            setting = {name: float(row[name]) for name in (*DIALS, *STRUCTURE)}
            cell = found.setdefault((row["part"], *setting.values()), Cell(row["part"], setting, {}))
            cell.rows[row["method"]] = {name: _value(name, text) for name, text in row.items()}
    return [found[key] for key in sorted(found)]


def _value(name: str, text: str) -> Any:
    if name in ("part", "method"):
        return text
    if text in ("True", "False"):
        return text == "True"
    numbers = [float(part) for part in text.split()]
    return np.array(numbers) if len(numbers) > 1 else (numbers or [math.nan])[0]


def summary_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """``lab.csv``: a row for each setting, the ``mean``s over seeds; NaN as empty."""
    rows = []
    for cell in cells:
        gain, low, high = cell.area_gain()
        values = {
            "area_mean": cell.value("area"),
            "gain_std": gain,
            "gain_low": low,
            "gain_high": high,
            "rate_mean": cell.rows["mean"]["rate_area"],
            "rate_std": cell.rows["std"]["rate_area"],
            "steps_ratio": math.exp(cell.steps_ratio()),
            "flow_ratio": math.exp(cell.flow_ratio()),
            "c": cell.value("c_steps"),
            "c_logged": cell.value("c_logged_steps"),
            "c_flow": cell.value("c_slowest"),
            "c_start": start_constant(cell.setting),
            **{name: cell.value(name) for name in ("variation_prompts", "variation_time", "dead")},
            **{name: cell.value(name) for name in cell.rows["mean"] if name.startswith(("start_", "half_"))},
        }
        plain = {name: "" if math.isnan(value) else f"{value:.4g}" for name, value in values.items()}
        rows.append({"part": cell.part} | {name: f"{value:g}" for name, value in cell.setting.items()} | plain)
    return rows


def start_constant(setting: Mapping[str, float]) -> float:
    """C as the first batch shows it in expectation: 8/3 of the mean std of a group of G sampled answers before
    training (the true sigma where gradients are exact)."""
    policies = Policies(Setting(**{name: int(v) if name in WHOLE else v for name, v in setting.items()}), [0])
    logits = policies.base_SPK[0, :, 0] - math.log(policies.setting.answers - 1)
    m = policies.pass_rates((1 / (1 + np.exp(-logits)))[:, None])
    group = policies.setting.group
    if not group:
        return float(8 / 3 * np.sqrt(m * (1 - m)).mean())
    right = np.arange(group + 1)
    ways = np.array([float(math.comb(group, k)) for k in right])
    chances = ways * m[:, None] ** right * (1 - m[:, None]) ** (group - right)
    return float(8 / 3 * (chances * np.sqrt(right / group * (1 - right / group))).sum(-1).mean())
