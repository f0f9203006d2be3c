"""Does what-if's rate predict best learning rates? ``python examples/paper/what_if_rates.py``.

Trains the built-in policy with ``std`` by plain SGD, and keeps of each logged step what the rate is made of:
``progress`` and ``square`` of every method (``grpo_kernels/interference/what_if.py``). Prints the pooled rates beside
the ratios of best rates that sweeps have measured. Writes ``results/what_if_rates.csv``, a row for each method of a
step; a repeated command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_ext.report.what_if_table import Rate, StepTable

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

METHODS = ["std", "mean", "loo", "power", "batch_std", "max_rl", "none"]  # power: alpha 0.5
RESULTS = Path(__file__).parent / "results" / "what_if_rates.csv"
Row = dict[str, str]  # of the CSV


@dataclass(frozen=True)
class Setting:
    """A task with 16 prompts a step; ``learning_rate``: ``std``'s best there."""

    dataset: str
    answers: int
    learning_rate: float


SETTINGS = {
    "mixture": Setting("mixture", 8, 0.04),
    "arithmetic": Setting("arithmetic", 8, 0.01),
}
# best learning rate over std's, with its 95 % interval, by SGD without clipping; copied from README.md
# (mean on the mixture), ../ablation/several_tasks.md (max_rl, none) and ../ablation/README.md (arithmetic)
MEASURED = {
    ("mixture", "mean"): (2.22, 2.16, 2.45),
    ("mixture", "max_rl"): (0.85, 0.71, 0.90),
    ("mixture", "none"): (2.43, 2.33, 3.46),
    ("arithmetic", "mean"): (2.50, 1.55, 2.60),
    ("arithmetic", "batch_std"): (0.77, 0.51, 0.96),
    ("arithmetic", "max_rl"): (0.74, 0.65, 1.12),
}


# Training


def measure(name: str, seed: int, steps: int, every: int) -> list[Row]:
    """Trains once with ``std``; returns a row for each method of each logged step.

    The run measures exactly, without a sketch, and scores advantages of 0 too.
    """
    from examples.ablation.train import DEFAULTS, Task, make_trainer
    from grpo_kernels.recorder.files import read_interference
    from trl_ext import CurvatureGRPOConfig

    one = SETTINGS[name]
    answers = {"num_generations": one.answers, "per_device_train_batch_size": 16 * one.answers}
    lengths = {"max_steps": steps, "eval_steps": steps, "max_completion_length": 4 if one.dataset != "mixture" else 5}
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": one.learning_rate, "seed": seed}
    exact = {"interference_every": every, "interference_dim": 0, "what_if": METHODS, "what_if_dead": True}
    with tempfile.TemporaryDirectory() as folder:
        options = {**DEFAULTS, **answers, **lengths, **sgd, **exact, "output_dir": folder}
        make_trainer(Task(one.dataset, eval_size=8), CurvatureGRPOConfig(**options)).train()
        records = read_interference(folder)
    rows = []
    for record in records:
        for method, one in (record.what_if or {"rows": {}})["rows"].items():
            numbers = {key: f"{one.get(key, math.nan):.6g}" for key in ("progress", "square", "factor")}
            rows.append({"setting": name, "seed": str(seed), "step": str(record.step), "method": method, **numbers})
    return rows


# Rows -> tables


def read_rows(path: Path = RESULTS) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def step_tables(rows: Sequence[Row]) -> list[StepTable]:
    """One table for each logged step, as ``pooled_rates`` takes them."""
    found: dict[tuple[str, ...], dict] = {}
    for row in rows:
        table = found.setdefault((row["setting"], row["seed"], row["step"]), {"rows": {}})
        table["rows"][row["method"]] = {"progress": float(row["progress"]), "square": float(row["square"])}
    return list(found.values())  # type: ignore[arg-type]


def rates(rows: Sequence[Row]) -> dict[str, Rate]:
    """Each method's best learning rate over ``std``'s; without those that can't be told."""
    from trl_ext.report.what_if_table import pooled_rates

    return pooled_rates(step_tables(rows))


def rates_of_runs(rows: Sequence[Row]) -> list[dict[str, Rate]]:
    """The same of each seed's run alone."""
    seeds = sorted({int(row["seed"]) for row in rows})
    return [rates([row for row in rows if int(row["seed"]) == seed]) for seed in seeds]


def median_rate(rows: Sequence[Row], method: str) -> float:
    """1 / median of the factor over steps: the prediction that the pooled rate replaces."""
    return 1 / statistics.median(float(row["factor"]) for row in rows if row["method"] == method)


def arithmetic_range(method: str, answers: int) -> tuple[float, float] | None:
    """Least and most rate over ``std``'s that a group of rewards of 0 or 1 can ask for; None: no multiple of ``std``.

    A method that divides a group by another number than ``std`` asks for the ratio of the two numbers.
    """
    import torch

    from grpo_kernels.interference.what_if import candidates

    own, std = candidates([method, "std"], eps=0.0)
    if own.needs_batch or method == "none":
        return None
    groups = torch.ones(answers, answers, dtype=torch.float64).tril()[:-1]  # one right answer, two, ...
    ratios = (std.advantages(groups, {}) / own.advantages(groups, {}))[:, 0]
    return float(ratios.min()), float(ratios.max())


def log_errors(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """(setting, method) -> log of predicted over measured rate: the pooled one's, and that of 1 / median factor."""
    found = {}
    for (name, method), (measured, *_) in MEASURED.items():
        own = [row for row in rows if row["setting"] == name]
        if rate := rates(own).get(method):
            found[name, method] = math.log(rate.value / measured), math.log(median_rate(own, method) / measured)
    return found


def holds(rate: Rate, measured: tuple[float, float, float]) -> bool:
    """Whether the interval of the prediction overlaps that of the measurement."""
    _, low, high = measured
    return rate.low <= high and low <= rate.high


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def table(rows: Sequence[Row], name: str) -> list[str]:
    """One setting's lines: what was predicted, measured, and what arithmetic allows."""
    from examples.ablation.tables import markdown

    rows = [row for row in rows if row["setting"] == name]
    pooled, runs, lines = rates(rows), rates_of_runs(rows), []
    for method in METHODS[1:]:
        if not any(row["method"] == method for row in rows):
            continue
        rate, bound = pooled.get(method), arithmetic_range(method, SETTINGS[name].answers)
        measured = MEASURED.get((name, method))
        lines.append(
            [
                f"`{method}`",
                interval(rate.value, rate.low, rate.high) if rate else "absent",
                f"{sum(method in run for run in runs)} of {len(runs)}",
                f"{median_rate(rows, method):.2f}",
                interval(*measured) if measured else "",
                ("yes" if holds(rate, measured) else "no") if rate and measured else "",
                f"{bound[0]:.2f} to {bound[1]:.2f}" if bound else "",
            ]
        )
    head = ["method", "pooled rate", "runs with a rate", "1 / median factor", "measured", "holds", "arithmetic range"]
    return markdown(head, lines)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(100, 103)))
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--every", type=int, default=2, help="steps between those that are measured")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    import trl_ext  # noqa: F401 - before transformers: it keeps a start quiet
    from trl_ext.ablate.page import write_csv

    rows = read_rows(options.output)
    for name in options.settings:
        for seed in options.seeds:
            if not any((row["setting"], row["seed"]) == (name, str(seed)) for row in rows):
                rows += measure(name, seed, options.steps, options.every)
                write_csv(options.output, rows)
                print(f"{name}, seed {seed}: done", flush=True)
    for name in dict.fromkeys(row["setting"] for row in rows):
        print(f"\n{name}\n\n" + "\n".join(table(rows, name)))


if __name__ == "__main__":
    main(sys.argv[1:])
