"""``max_rl`` against ``std`` on hard prompts, by right and by flipped rewards: run this file.

Writes every evaluation as a CSV and prints the tables of verified_rewards.md. Repeat an interrupted command to go on.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.ablation.curves import Run
    from examples.ablation.runs import Settings

if __name__ == "__main__":  # as in ablate.py
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONSAFEPATH"] = "1"

METHODS = ("std", "max_rl")
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
TUNING_SEEDS, SEEDS = (100, 101), tuple(range(10))
CONFIRMED_AT, FRESH_SEEDS = 4e-4, tuple(range(10, 30))  # right rewards alone, at the rate that both methods chose
FLIPPED = {"right": 0.0, "flips": 0.1}  # share of the rewards in training
LEVEL = 1  # sums to 20, the one that the warm-up learns within a minute
STEPS, EVAL_EVERY = 100, 20


def hard_policy(seed: int) -> str:
    """Returns the folder of a policy that can calculate (accuracy 0.6) and was taught not to, down to 0.1."""
    from trl_ext.tasks import small_policy

    class Hard(small_policy.WarmUp):
        learned, target, careless = 0.6, 0.1, 0.9

    recipe = [seed, LEVEL, Hard.learned, Hard.target, Hard.careless]
    made = small_policy.cached_policy(
        "hard-policy", recipe, lambda: small_policy.warm_up(seed, (LEVEL,), kind=Hard)[:2]
    )
    return str(made)


def settings_of(kind: str, method: str, rate: float, seed: int) -> Settings:
    """The ablation's settings, with a policy whose prompts are hard."""
    from dataclasses import replace

    from examples.ablation.ablate import parse_arguments, run_settings

    lengths = ["--max_steps", str(STEPS), "--eval_every", str(EVAL_EVERY), "--interference_every", "0"]
    task = ["--dataset", "arithmetic", "--levels", str(LEVEL), "--eval_size", "76"]
    options = parse_arguments([*lengths, *task, "--reward_noise", str(FLIPPED[kind])])
    made = run_settings(options, method, rate, seed)
    return replace(made, model=hard_policy(seed), train_size=350)


def rows_of(kind: str, phase: str, runs: Iterable[Run]) -> list[dict[str, object]]:
    return [
        {"rewards": kind, "phase": phase, "method": run.method, "learning_rate": run.learning_rate, "seed": run.seed}
        | {"step": int(step), "held_out_accuracy": round(accuracy, 5)}
        for run in runs
        for step, accuracy in zip(*run.curve("held_out_accuracy"), strict=True)
    ]


def table(rows: Sequence[Mapping[str, object]], phase: str = "final") -> str:
    """A row for each kind of rewards: accuracies at the end, and ``max_rl`` less ``std``, paired by seed."""
    from examples.ablation.curves import mean_interval

    lines = ["| rewards | `std` (rate) | `max_rl` (rate) | difference |", "|---|---|---|---|"]
    for kind in dict.fromkeys(str(row["rewards"]) for row in rows if row["phase"] == phase):
        final = [row for row in rows if (row["rewards"], row["phase"]) == (kind, phase)]
        end = [row for row in final if int(str(row["step"])) == STEPS]
        accuracy = {
            m: {int(str(row["seed"])): float(str(row["held_out_accuracy"])) for row in end if row["method"] == m}
            for m in METHODS
        }
        rate = {str(row["method"]): float(str(row["learning_rate"])) for row in end}
        cells = [f"{statistics.fmean(accuracy[m].values()):.3f} ({rate[m]:g})" for m in METHODS]
        less = mean_interval([accuracy["max_rl"][seed] - accuracy["std"][seed] for seed in accuracy["std"]])
        lines.append(f"| {kind} | {' | '.join(cells)} | {less:+.3f} |")
    return "\n".join(lines)


def write_rows(output_dir: str, name: str, rows: Sequence[dict[str, object]]) -> None:
    with open(Path(output_dir) / name, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def confirm(output_dir: str) -> None:
    """Right rewards on fresh seeds, at a rate fixed beforehand."""
    from examples.ablation.runs import Workers

    with Workers(1, len(METHODS) * len(FRESH_SEEDS)) as workers:
        wanted = [settings_of("right", method, CONFIRMED_AT, seed) for seed in FRESH_SEEDS for method in METHODS]
        rows = rows_of("right", "confirm", workers.run(output_dir, wanted))
    write_rows(output_dir, "confirmed.csv", rows)
    print(table(rows, "confirm"))
    workers.end_if_failed()


def compare(output_dir: str) -> None:
    """Both kinds of rewards, each method at the best rate of a sweep on other seeds."""
    from examples.ablation.curves import best_learning_rate
    from examples.ablation.runs import Workers

    rows: list[dict[str, object]] = []
    total = len(FLIPPED) * len(METHODS) * (len(RATES) * len(TUNING_SEEDS) + len(SEEDS))
    with Workers(1, total) as workers:
        for kind, method in product(FLIPPED, METHODS):
            sweep = [settings_of(kind, method, rate, seed) for rate, seed in product(RATES, TUNING_SEEDS)]
            tuning = workers.run(output_dir, sweep)
            best = best_learning_rate(tuning)
            print(f"{kind}, {method}: learning rate {best:g}", flush=True)
            final = workers.run(output_dir, [settings_of(kind, method, best, seed) for seed in SEEDS])
            rows += rows_of(kind, "sweep", tuning) + rows_of(kind, "final", final)
    write_rows(output_dir, "verified_rewards.csv", rows)
    print(table(rows))
    workers.end_if_failed()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="runs/verified_rewards")
    parser.add_argument("--confirm", action="store_true", help="right rewards alone, on fresh seeds")
    options = parser.parse_args(arguments)
    (Path(options.output_dir) / "runs").mkdir(parents=True, exist_ok=True)
    (confirm if options.confirm else compare)(options.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
