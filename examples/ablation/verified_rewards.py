"""``max_rl`` against ``std`` on hard prompts, by right and by flipped rewards: the tables of verified_rewards.md.

    python examples/ablation/verified_rewards.py runs/right runs/flips

Reads studies that ``python -m trl_ext ablate`` made by the commands on the page, each named by its folder.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.ablation.curves import mean_interval, read_runs

METHODS = ("std", "max_rl")
STEPS = 100


def rows_of(study: str) -> list[dict[str, object]]:
    """Returns a row for each evaluation of the compared runs."""
    return [
        {"rewards": Path(study).name, "phase": "final", "method": run.method, "learning_rate": run.learning_rate}
        | {"seed": run.seed, "step": int(step), "held_out_accuracy": accuracy}
        for runs in read_runs(study)[1].values()
        for run in runs
        for step, accuracy in zip(*run.curve("held_out_accuracy"), strict=True)
    ]


def table(rows: Sequence[Mapping[str, object]], phase: str = "final") -> str:
    """A row for each kind of rewards: accuracies at the end, and ``max_rl`` less ``std``, paired by seed."""
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


if __name__ == "__main__":
    print(table([row for study in sys.argv[1:] for row in rows_of(study)]))
