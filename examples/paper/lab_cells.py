"""The lab's measurements: a ``Cell`` for each setting, read from ``cells.csv``, and the rows of its summaries.

``mean`` against ``std``, paired by seed: area is the mean accuracy over all steps, each method at the rate that is best
for it; steps are those to half of the failures, each at the rate that is best for that. Intervals are 95%.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np

from examples.ablation.curves import Interval, mean_interval

from .log_linear import Policies, Setting

DIALS = ("overlap", "spread", "pass_rate", "group", "noise")
FEWEST_STEPS = 3  # below, there is nothing to converge: a step or two solve it
ENOUGH_SEEDS = 0.8
FLAGS = {"True": 1.0, "False": 0.0}


@dataclass(frozen=True)
class Cell:
    """A setting with its methods' rows; each value is an array, over seeds where it is measured by seed."""

    part: str
    setting: Setting
    rows: dict[str, dict[str, np.ndarray]]

    def value(self, name: str) -> float:
        """The mean over seeds of one of ``mean``'s columns; nan where no seed has it."""
        values = self.rows["mean"][name]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def area_gain(self, method: str = "std", reference: str = "mean") -> Interval:
        return mean_interval(list(self.rows[method]["area"] - self.rows[reference]["area"]))

    def steps_ratio(self) -> float:
        """log(T_std / T_mean), a mean over the seeds where both got there; nan where too few did, where fewer than
        three steps were taken, or where no rate was too large."""
        first, second = self.rows["std"], self.rows["mean"]
        both = np.isfinite(first["steps"]) & np.isfinite(second["steps"])
        if first["edge_steps"].any() or second["edge_steps"].any() or both.mean() < ENOUGH_SEEDS:
            return math.nan
        if min(np.median(one["steps"][both]) for one in (first, second)) < FEWEST_STEPS:
            return math.nan
        return float(np.log(first["steps"][both] / second["steps"][both]).mean())

    def flow_ratio(self) -> float:
        """log of T_std / T_mean with small steps, ``std``'s 3/8 of ``mean``'s, as C = 8/3 of sigma has it."""
        first, second = self.rows["std"]["flow_time"], self.rows["mean"]["flow_time"]
        both = np.isfinite(first) & np.isfinite(second)
        return float(np.log(8 / 3 * first[both] / second[both]).mean()) if both.mean() >= ENOUGH_SEEDS else math.nan


def levels(cells: Sequence[Cell], dial: str) -> list[float]:
    return sorted({getattr(cell.setting, dial) for cell in cells})


def where(cells: Sequence[Cell], **wanted: float) -> list[Cell]:
    """The cells whose dials have these levels."""
    return [cell for cell in cells if all(getattr(cell.setting, dial) == level for dial, level in wanted.items())]


def by_gradients(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells with exact gradients, and those with sampled ones."""
    return where(cells, group=0), [cell for cell in cells if cell.setting.group]


def by_rewards(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells whose rewards are right, and those with flips."""
    return where(cells, noise=0.0), [cell for cell in cells if cell.setting.noise]


def read_cells(path: Path) -> list[Cell]:
    """Reads ``cells.csv``, sorted by setting, without rows that were cut off."""
    found: dict[tuple[str, Setting], Cell] = {}
    with open(path, newline="") as stream:
        for row in csv.DictReader(stream):
            if None in row.values():
                continue
            setting = Setting(**{field.name: type(field.default)(row[field.name]) for field in fields(Setting)})
            cell = found.setdefault((row["part"], setting), Cell(row["part"], setting, {}))
            cell.rows[row["method"]] = {k: _numbers(v) for k, v in row.items() if k not in ("part", "method")}
    return sorted(found.values(), key=lambda cell: (cell.part, *astuple(cell.setting)))


def _numbers(text: str) -> np.ndarray:
    return np.array([FLAGS[part] if part in FLAGS else float(part) for part in text.split()])


def summary_rows(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """``lab.csv``: a row for each setting, the ``mean``s over seeds; NaN as empty."""
    rows = []
    for cell in cells:
        gain = cell.area_gain()
        values = {
            "area_mean": cell.value("area"),
            "gain_std": gain.estimate,
            "gain_low": gain.low,
            "gain_high": gain.high,
            "rate_mean": cell.value("rate_area"),
            "rate_std": cell.rows["std"]["rate_area"].item(),
            "steps_ratio": math.exp(cell.steps_ratio()),
            "flow_ratio": math.exp(cell.flow_ratio()),
            "c": cell.value("c_steps"),
            "own_std_8_3": cell.value("own_std_8_3_steps"),
            "c_flow": cell.value("c_slowest"),
            "own_std_8_3_start": own_std_at_start(cell.setting),
            **{name: cell.value(name) for name in ("variation_prompts", "variation_time", "dead")},
            **{name: cell.value(name) for name in cell.rows["mean"] if name.startswith(("start_", "half_"))},
        }
        rows.append({"part": cell.part} | _texts(asdict(cell.setting)) | _texts(values))
    return rows


def method_rows(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """``lab_methods.csv``: a row for each setting and method of the part "methods"."""
    return [
        _texts({dial: getattr(cell.setting, dial) for dial in DIALS}) | {"method": name} | _texts(_areas(cell, name))
        for cell in cells
        if cell.part == "methods"
        for name in cell.rows
    ]


def _areas(cell: Cell, method: str) -> dict[str, float]:
    """A method's area, and what it is less ``mean``'s and less ``std``'s."""
    row = cell.rows[method]
    values = {"area": float(row["area"].mean()), "rate": row["rate_area"].item()}
    for reference in ("mean", "std"):
        gain, less = cell.area_gain(method, reference), f"less_{reference}"
        values |= {less: gain.estimate, f"{less}_low": gain.low, f"{less}_high": gain.high}
    return values


def _texts(values: Mapping[str, float]) -> dict[str, str]:
    """Four digits of each value; NaN as empty."""
    return {name: "" if math.isnan(value) else f"{value:.4g}" for name, value in values.items()}


def own_std_at_start(setting: Setting) -> float:
    """Returns 8/3 of the groups' own std before training, in expectation: the mean population std of G sampled answers.

    It is below C, as C takes the true sigma. With exact gradients the two are the same.
    """
    policies, group = Policies(setting, [0]), setting.group
    logits = policies.base_SPK[0, :, 0] - math.log(setting.answers - 1)
    m = policies.pass_rates((1 / (1 + np.exp(-logits)))[:, None])
    if not group:
        return float(8 / 3 * np.sqrt(m * (1 - m)).mean())
    right = np.arange(group + 1)
    ways = np.array([float(math.comb(group, k)) for k in right])
    chances = ways * m[:, None] ** right * (1 - m[:, None]) ** (group - right)
    return float(8 / 3 * (chances * np.sqrt(right / group * (1 - right / group))).sum(-1).mean())
