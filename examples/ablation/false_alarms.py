"""How often each signature raises a false alarm, and how often it finds a sickness: the table of ``false_alarms.md``.

    python examples/ablation/false_alarms.py

False alarms are counted on the committed ablations' runs that trained well (``results/*.csv``) and on new healthy runs
with full logs (``healthy_runs.py``), looked at as the watch does while they go. Runs of one seed are alike: what counts
is the number of seeds with an alarm, with a 95 % Clopper-Pearson interval. Sicknesses (``sickness.py``) are injected
into the full logs. A second table shows how far healthy runs stay below thresholds (``margins.py``).
"""

from __future__ import annotations

import csv
import functools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.ablation import healthy_runs
from examples.ablation.curves import LOGGED
from examples.ablation.margins import MARGINS, left_out
from examples.ablation.sickness import SICKNESSES
from grpo_kernels.recorder.files import InterferenceRecord
from trl_ext.report.read_run import Run
from trl_ext.report.signatures import SIGNATURES, Finding, Unknown
from trl_ext.report.verdicts import LEVELS
from trl_ext.report.watch import looked_at

RESULTS = Path(__file__).parent / "results"
FILES = ("ablation", "ablation_sgd", "ablation_measured", "ablation_measured_sgd", "several_tasks", "several_tasks_sgd")
NEEDED = ("reward", "grad_norm", "entropy", "scale_mean", "zero_variance_frac", "sigma_mean", "held_out_accuracy")
GAINED, LOST = 0.03, 0.15  # held-out accuracy: by the last evaluation; the most below an earlier one
ANSWERS = {"num_generations": 8, "generation_batch_size": 128, "logging_steps": 1}
PROBLEMS, PROMPTS = 700, 16  # of the ablations' runs: to train on; of a step
Line = dict[str, float]


@dataclass(frozen=True)
class Healthy:
    """A healthy run: the seed that its policy is of, its log, and its measured steps."""

    seed: str
    lines: list[Line]
    records: list[InterferenceRecord] = field(default_factory=list)

    def until(self, length: int) -> Run:
        """What the run's folder holds once the log has so many lines."""
        lines = self.lines[:length]
        return Run(RESULTS, "", lines, [one for one in self.records if one.step <= lines[-1]["step"]], dict(ANSWERS))

    def looks(self) -> list[Run]:
        """The run as the watch sees it while it goes, and last the whole run."""
        lengths = {looked_at(length) for length in range(1, len(self.lines) + 1)} - {0} | {len(self.lines)}
        return [self.until(length) for length in sorted(lengths)]


# Healthy runs


def ablation_runs() -> list[Healthy]:
    """The committed ablations' runs that trained well."""
    logs: dict[tuple[str, ...], list[Line]] = {}
    for name in FILES:
        with open(RESULTS / f"{name}.csv", newline="") as stream:
            for row in csv.DictReader(stream):
                key = (name, row.get("phase", ""), row["method"], row["learning_rate"], row["seed"])
                logs.setdefault(key, []).extend(log_lines(row))
    # the mixture's policies are others than arithmetic's
    seeds = {key: f"{'mixture' if key[0].startswith('several') else 'arithmetic'} {key[-1]}" for key in logs}
    return [Healthy(seeds[key], lines) for key, lines in logs.items() if trained_well(lines)]


def log_lines(row: dict[str, str]) -> list[Line]:
    """The lines of the log that a row of an ablation's CSV stands for: a step's, and an evaluation's after it."""
    step = int(float(row["step"]))
    numbers = {LOGGED[column]: float(row[column]) for column in NEEDED if row.get(column)}
    accuracy = numbers.pop("eval_accuracy", None)
    lines = []
    if "reward" in numbers:
        rewards = {"loss": 0.0, "accuracy": numbers["reward"], "epoch": step * PROMPTS / PROBLEMS}
        lines.append({**numbers, **rewards, "step": step})
    if accuracy is not None:
        lines.append({"eval_accuracy": accuracy, "eval_reward": accuracy, "step": step})
    return lines


def trained_well(lines: Iterable[Line]) -> bool:
    accuracies = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    lost = max(max(accuracies[: i + 1]) - accuracy for i, accuracy in enumerate(accuracies))
    return accuracies[-1] - accuracies[0] > GAINED and lost < LOST


@functools.cache
def full_runs() -> list[Healthy]:
    """The healthy runs with full logs, one a seed."""
    records = healthy_runs.read_records()
    return [Healthy(f"full {seed}", lines, records[seed]) for seed, lines in healthy_runs.read_logs().items()]


# False alarms


@dataclass(frozen=True)
class Alarms:
    """Of one signature: the seeds whose logs can tell of it, and those with an alarm, by level."""

    told: set[str] = field(default_factory=set)
    raised: dict[str, set[str]] = field(default_factory=dict)

    @property
    def seeds(self) -> set[str]:
        return set().union(*self.raised.values())


def count_alarms(runs: Sequence[Healthy], names: Iterable[str] = SIGNATURES) -> dict[str, Alarms]:
    alarms = {name: Alarms() for name in SIGNATURES}
    for run in runs:
        *before, whole = run.looks()
        last = {name: SIGNATURES[name].find(whole) for name in names}
        told = [name for name, found in last.items() if not isinstance(found, Unknown)]
        for name in told:
            alarms[name].told.add(run.seed)
            for found in (last[name], *(SIGNATURES[name].find(look) for look in before)):
                if isinstance(found, Finding):
                    alarms[name].raised.setdefault(found.level, set()).add(run.seed)
    return alarms


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


# Detection


def detected(name: str, strength: float) -> tuple[int, int]:
    """(seeds where the signature finds this sickness, seeds): without those where it finds the healthy run's log sick,
    and those that don't log what it reads."""
    found = n = 0
    for i, run in enumerate(full_runs()):
        healthy = SIGNATURES[name].find(run.until(len(run.lines)))
        if isinstance(healthy, Finding):
            continue
        lines, records = SICKNESSES[name].inject(run.lines, run.records, strength, i)
        sick = SIGNATURES[name].find(Healthy(run.seed, lines, records).until(len(lines)))
        if not isinstance(sick, Unknown):
            n += 1
            found += sick is not None
    return found, n


# Tables


def alarms_of(name: str, ablations: Alarms, full: Alarms) -> str:
    """Seeds with an alarm, of those that can tell, with the interval; the levels where there are alarms."""
    told, seeds = len(ablations.told) + len(full.told), len(ablations.seeds) + len(full.seeds)
    if not told:
        return "uncalibrated"
    raised = [level for level in LEVELS if level in ablations.raised or level in full.raised]
    low, high = clopper_pearson(seeds, told)
    levels = f", {' and '.join(raised)}" if raised else ""
    return f"{seeds} of {told}, {100 * low:.0f}-{high:.0%}{levels}"


def found_of(name: str) -> str:
    """The sickness with its strengths, and the share of seeds where it is found at each."""
    sickness = SICKNESSES.get(name)
    if sickness is None:
        return "not injected | "
    counts = [detected(name, strength) for strength in sickness.strengths]
    strengths = "/".join(f"{strength:g}" for strength in sickness.strengths)
    shares = "/".join(f"{100 * found / n:.0f}" for found, n in counts)
    return f"{sickness.unit}: {strengths} | {shares}%"


def table(ablations: dict[str, Alarms], full: dict[str, Alarms]) -> str:
    lines = ["| signature | false alarms | injected | found |", "|---|---|---|---|"]
    for name in SIGNATURES:
        lines.append(f"| `{name}` | {alarms_of(name, ablations[name], full[name])} | {found_of(name)} |")
    return "\n".join(lines)


def margins_table(runs: Sequence[Healthy]) -> str:
    """By signature the most that a healthy seed reached at any look, in thresholds, and alarms of left-out seeds."""
    lines = ["| signature | most, in thresholds | alarms as it is | alarms as chosen |", "|---|---|---|---|"]
    for name, badness in MARGINS.items():
        most: dict[str, float] = {}
        for run in runs:
            whole, looks = SIGNATURES[name].find(run.until(len(run.lines))), run.looks()
            if isinstance(whole, Unknown):
                continue
            found = [badness(look) for look in looks if len(look.logs) > 10]
            most[run.seed] = max([most.get(run.seed, -math.inf), *found])
        present, chosen = left_out(most)
        lines.append(f"| `{name}` | {max(most.values()):.2g} | {present} of {len(most)} | {chosen} of {len(most)} |")
    return "\n".join(lines)


def main() -> None:
    ablations, full = ablation_runs(), full_runs()
    print(table(count_alarms(ablations), count_alarms(full)))
    print()
    print(margins_table([*ablations, *full]))


if __name__ == "__main__":
    main()
