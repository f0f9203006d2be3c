"""The tables of dead_groups.md: ``python examples/dead_groups/results.py runs/dead_groups``.

It writes a row for each run to ``results/dead_groups.csv``, and prints the tables; without a folder it reads that file.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.dead_groups.costs import PRICES, area, at_budget
from examples.dead_groups.run import CONFIRM_SEEDS, SCREEN_SEEDS, TUNING_SEEDS, task_of

CSV = Path(__file__).parent / "results" / "dead_groups.csv"
PARTS = {"sweep": TUNING_SEEDS, "screen": SCREEN_SEEDS, "confirm": CONFIRM_SEEDS}
STRATA = ("never", "hard", "middle", "always")
PRIMARY = 3.0  # price
WIDENED = 1.4  # for the choice of rates
NOT_WORSE = -0.01
Row = dict[str, Any]


def summary(file: Path) -> Row:
    """Returns a run's row: accuracies when each budget was spent, and what it had done at the primary one."""
    setting, arm, rate, seed = re.fullmatch(r"(.+)_([a-z]+)_lr(.+)_seed(\d+)", file.stem).groups()  # type: ignore[union-attr]
    rows, task = json.loads(file.read_text()), task_of(setting)
    part = next(name for name, seeds in PARTS.items() if int(seed) in seeds)
    found: Row = {"part": part, "setting": setting, "arm": arm, "learning_rate": float(rate), "seed": int(seed)}
    found |= {f"at_{price:g}": at_budget(rows, task, price) for price in PRICES}
    found["mean"] = statistics.fmean(area(rows, task, price) for price in PRICES)
    found |= {f"{name}_at_3": at_budget(rows, task, PRIMARY, name) for name in STRATA}
    at = {name: at_budget(rows, task, PRIMARY, name) for name in ("step", "generated", "trained", "groups")}
    shares = {
        name: at_budget(rows, task, PRIMARY, f"{name}_groups" if name != "expected" else name) / at["groups"]
        for name in ("live", "true_live", "expected")
    }
    last = rows[-1]
    seconds = {"second_generated": last["generation"] / last["generated"]}
    seconds["second_trained"] = last["training"] / max(last["trained"], 1)
    return {**found, **at, **shares, **seconds}


def write(folder: Path) -> None:
    rows = [summary(file) for file in sorted(folder.glob("*_seed*.json"))]
    if not rows:
        sys.exit(f"error: {folder} has no runs of run.py")
    CSV.parent.mkdir(exist_ok=True)
    with open(CSV, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read() -> list[Row]:
    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with open(CSV, newline="") as stream:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(stream)]


def compared(rows: Sequence[Row], part: str) -> dict[tuple[str, str], list[Row]]:
    """Returns (setting, arm) -> runs at the rate that the sweep chose, by seed."""
    chosen, found = rates(rows), dict[tuple[str, str], list[Row]]()
    for row in rows:
        pair = row["setting"], row["arm"]
        if row["part"] == part and row["learning_rate"] == chosen.get(pair, row["learning_rate"]):
            found.setdefault(pair, []).append(row)
    return {pair: sorted(runs, key=lambda one: one["seed"]) for pair, runs in found.items()}


def rates(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Returns the best rate of each swept setting and arm, by the mean over the run and the tuning seeds."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        if row["part"] == "sweep":
            by_rate = scores.setdefault((row["setting"], row["arm"]), {})
            by_rate.setdefault(row["learning_rate"], []).append(row["mean"])
    return {pair: max(of.items(), key=lambda item: statistics.fmean(item[1]))[0] for pair, of in scores.items()}


@dataclass(frozen=True)
class Difference:
    """An arm less ``std``, paired by seed: mean, its standard error widened by ``WIDENED``, and seeds."""

    mean: float
    error: float
    seeds: int

    @property
    def p(self) -> float:
        return float(2 * t.sf(abs(self.mean) / self.error, self.seeds - 1))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        half = float(t.ppf((1 + level) / 2, self.seeds - 1)) * self.error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def difference(arm: Sequence[Row], std: Sequence[Row], outcome: str) -> Difference:
    pairs = {row["seed"]: row[outcome] for row in std}
    values = [row[outcome] - pairs[row["seed"]] for row in arm]
    error = WIDENED * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(statistics.fmean(values), error, len(values))


def holm(differences: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], str]:
    """Judges each difference: "better", "worse", "not worse" or "unknown", by intervals of Holm's levels.

    The smallest p has the level 1 - 0.05 / m, the next 1 - 0.05 / (m - 1), until one isn't significant; it and those
    after it keep its level.
    """
    judged: dict[tuple[str, str], str] = {}
    left, significant = len(differences), True
    for pair, one in sorted(differences.items(), key=lambda item: item[1].p):
        low, high = one.interval(1 - 0.05 / left)
        significant = significant and not low <= 0 <= high
        if significant:
            judged[pair] = "better" if low > 0 else "worse"
            left -= 1
        else:
            judged[pair] = "not worse" if low > NOT_WORSE else "unknown"
    return judged


def difference_table(rows: Sequence[Row], part: str) -> str:
    runs = compared(rows, part)
    lines = ["| setting | arm | " + " | ".join(f"price {price:g}" for price in PRICES) + " |", "|---" * 6 + "|"]
    for (setting, arm), own in runs.items():
        if arm != "std":
            std = runs[setting, "std"]
            cells = [str(difference(own, std, f"at_{price:g}")) for price in PRICES]
            lines.append(f"| `{setting}` | `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict_table(rows: Sequence[Row]) -> str:
    runs = compared(rows, "confirm")
    differences = {
        pair: difference(own, runs[pair[0], "std"], f"at_{PRIMARY:g}") for pair, own in runs.items() if pair[1] != "std"
    }
    judged = holm(differences)
    lines = ["| setting | arm | less `std` | verdict |", "|---|---|---|---|"]
    lines += [f"| `{s}` | `{a}` | {one} | {judged[s, a]} |" for (s, a), one in differences.items()]
    return "\n".join(lines)


def work_table(rows: Sequence[Row], part: str) -> str:
    """What each arm did until the primary budget was spent, and its accuracy by stratum."""
    names = (
        "learning_rate",
        "step",
        "live",
        "true_live",
        "expected",
        f"at_{PRIMARY:g}",
        *(f"{s}_at_3" for s in STRATA),
    )
    lines = [
        "| setting | arm | rate | steps | live | truly live | expected | accuracy | never | hard | middle | always |"
    ]
    lines.append("|---" * 12 + "|")
    for (setting, arm), own in compared(rows, part).items():
        means = [statistics.fmean(row[name] for row in own) for name in names]
        cells = [f"{means[0]:g}", f"{means[1]:.0f}", *(f"{mean:.2f}" for mean in means[2:5])]
        cells += [f"{mean:.3f}" for mean in means[5:]]
        lines.append(f"| `{setting}` | `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def prices(rows: Sequence[Row]) -> str:
    """The price of a generated token here, by setting: seconds of generation and training over tokens."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = [
            row["second_generated"] / row["second_trained"]
            for row in rows
            if row["setting"] == setting and row["arm"] == "std"
        ]
        lines.append(f"{setting}: {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        write(Path(sys.argv[1]))
    every = read()
    for part in ("screen", "confirm"):
        if any(row["part"] == part for row in every):
            print(f"\n{part}\n\n{difference_table(every, part)}\n\n{work_table(every, part)}")
    if any(row["part"] == "confirm" for row in every):
        print(f"\n{verdict_table(every)}")
    print(f"\n{prices(every)}")
