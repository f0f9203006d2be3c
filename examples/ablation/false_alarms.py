"""How often each verdict is raised on runs that trained well: ``python examples/ablation/false_alarms.py``.

The runs are those of the committed ablations (``results/*.csv``), whose logs hold reward, held-out accuracy, gradient
norm, entropy, scale and the share of dead groups. The watch looks at each log as it grows. A seed has a policy of its
own, and its runs are alike: what counts is the number of seeds with an alarm, with a 95 % Clopper-Pearson interval.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.ablation.curves import LOGGED
from trl_ext.report.read_run import Run
from trl_ext.report.signatures import SIGNATURES
from trl_ext.report.verdicts import Diagnosis, diagnose
from trl_ext.report.watch import looked_at

RESULTS = Path(__file__).parent / "results"
FILES = ("ablation", "ablation_sgd", "ablation_measured", "ablation_measured_sgd", "several_tasks", "several_tasks_sgd")
NEEDED = ("reward", "grad_norm", "entropy", "scale_mean", "zero_variance_frac", "sigma_mean", "held_out_accuracy")
GAINED, LOST = 0.03, 0.15  # held-out accuracy: by the last evaluation; the most below an earlier one
ANSWERS = {"num_generations": 8, "generation_batch_size": 128, "logging_steps": 1}
Key = tuple[str, ...]


def read_logs() -> dict[Key, list[dict[str, float]]]:
    """The lines of each run's log, by file, phase, method, rate and seed."""
    logs: dict[Key, list[dict[str, float]]] = defaultdict(list)
    for name in FILES:
        with open(RESULTS / f"{name}.csv", newline="") as stream:
            for row in csv.DictReader(stream):
                key = (name, row.get("phase", ""), row["method"], row["learning_rate"], row["seed"])
                line = {LOGGED[column]: float(row[column]) for column in NEEDED if row.get(column)}
                logs[key].append({**line, "step": int(float(row["step"]))})
    return logs


def trained_well(lines: list[dict[str, float]]) -> bool:
    accuracies = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    lost = max(max(accuracies[: i + 1]) - accuracy for i, accuracy in enumerate(accuracies))
    return accuracies[-1] - accuracies[0] > GAINED and lost < LOST


def looks(lines: list[dict[str, float]]) -> list[Diagnosis]:
    """What is found while the log grows, and last of the whole log."""
    lengths = sorted({looked_at(length) for length in range(1, len(lines) + 1)} | {len(lines)})
    return [diagnose(Run(RESULTS, "", list(lines[:length]), [], dict(ANSWERS))) for length in lengths]


def binomial_tail(n: int, at_least: int, p: float) -> float:
    """P(X >= at_least) of n trials."""
    term, below = (1 - p) ** n, 0.0
    for k in range(at_least):
        below += term
        term *= (n - k) / (k + 1) * p / (1 - p)
    return 1 - below


def clopper_pearson(found: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, by bisection."""

    def solve(at_least: int, tail: float) -> float:
        low, high = 0.0, 1.0 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if binomial_tail(n, at_least, middle) < tail else (low, middle)
        return low

    return (solve(found, 0.025) if found else 0.0), (solve(found + 1, 0.975) if found < n else 1.0)


def table() -> str:
    """A row for each verdict that some run raised, and one for the others that these logs can tell of."""
    runs = {key: lines for key, lines in read_logs().items() if trained_well(lines)}
    by_alarm: dict[tuple[str, str], list[Key]] = defaultdict(list)
    told: set[str] = set(SIGNATURES)
    for key, lines in runs.items():
        found = looks(lines)
        told -= found[-1].unknown.keys()
        for alarm in {(one.name, one.level) for look in found for one in look.verdicts}:
            by_alarm[alarm].append(key)

    def seeds(keys: list[Key]) -> int:
        return len({(key[0].startswith("several"), key[-1]) for key in keys})  # the mixture's policies are others

    n = seeds(list(runs))
    lines = [
        f"| verdict | level | runs of {len(runs)} | seeds of {n} | share of seeds, 95 % |",
        "|---|---|---|---|---|",
    ]
    for (name, level), keys in sorted(by_alarm.items(), key=lambda item: (-len(item[1]), item[0])):
        low, high = clopper_pearson(seeds(keys), n)
        lines.append(f"| `{name}` | {level} | {len(keys)} | {seeds(keys)} | {low:.0%} to {high:.0%} |")
    others = ", ".join(f"`{name}`" for name in SIGNATURES if name in told - {name for name, _ in by_alarm})
    return "\n".join([*lines, f"| {others}: each | any | 0 | 0 | 0% to {clopper_pearson(0, n)[1]:.0%} |"])


if __name__ == "__main__":
    print(table())
