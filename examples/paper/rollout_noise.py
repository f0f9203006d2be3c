"""How much of the prompts' orthogonality is rollout noise? ``python examples/paper/rollout_noise.py``.

The same prompts, answered 4 to 64 times each by the built-in policy, before training and after it; nothing is learned
while measuring (learning rate 0). A prompt's gradient from few answers is noisy, and noise is orthogonal to everything:
raw cosines grow with G where prompts really overlap, the alignment shouldn't. Writes ``rollout_noise.csv`` and
``rollout_noise.md``; repeat an interrupted command to go on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.ablation.runs import Settings

if __name__ == "__main__":  # as in ablate.py
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONSAFEPATH"] = "1"

GROUPS = [4, 8, 16, 32, 64]
PROMPTS = 16  # of a step
STATES = ("before training", "after training")
COLUMNS = {
    "near_orthogonal_frac": "near-orthogonal",
    "cos_abs_mean": "mean abs cosine",
    "cos_std": "std of cosines",
    "cos_mean": "mean cosine",
    "alignment": "alignment",
    "live_prompts": "live prompts",
}


def settings_of(model: str, seed: int, name: str = "", **training) -> Settings:
    """A run on the mixture, by the demo's recipe without evaluation and with these options; ``name``: to print."""
    from examples.ablation.runs import Settings
    from examples.tasks.command_line import demo_training

    options = {"logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    recipe = demo_training()
    recipe.pop("metric_for_best_model")
    return Settings(name, recipe | options | training | {"seed": seed}, model=model, eval_size=4)  # never evaluated


def train_policy(seed: int, steps: int, folder: str) -> None:
    """Trains a seed's policy and saves it, whole or not at all."""
    from examples.ablation.runs import trained, warm_up

    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        policy = warm_up(seed, "mixture", [])
        trainer = trained(settings_of(policy, seed, max_steps=steps, interference_every=0), scratch)
        trainer.save_model(scratch)
        trainer.processing_class.save_pretrained(scratch)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()


def measurement(policy: str, seed: int, state: str, group: int, steps: int) -> Settings:
    """Measures one policy with one group size; nothing is learned."""
    return settings_of(
        policy,
        seed + 1000,  # a draw of its own: some of the prompts may have been trained on
        f"{state}, G = {group}",
        learning_rate=0.0,
        max_steps=steps,
        num_generations=group,
        per_device_train_batch_size=PROMPTS * group,
        interference_every=1,
        interference_dim=0,
        what_if=[],
    )


def table(rows: Sequence[dict]) -> str:
    """``rollout_noise.md``: means over seeds of means over steps, with 95% intervals."""
    from examples.ablation.curves import mean_interval
    from examples.ablation.tables import markdown
    from examples.paper.phases_results import plus_minus

    def cell(state: str, group: int, name: str) -> str:
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            if (row["state"], row["group"]) == (state, group) and row[name] is not None:
                by_seed.setdefault(row["seed"], []).append(row[name])
        return plus_minus(mean_interval([statistics.fmean(values) for values in by_seed.values()])) if by_seed else ""

    places = product(dict.fromkeys(row["state"] for row in rows), sorted({row["group"] for row in rows}))
    cells = [[state, str(group), *(cell(state, group, name) for name in COLUMNS)] for state, group in places]
    return "\n".join([*markdown(["", "G", *COLUMNS.values()], cells), ""])


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Ends the program where an argument is wrong."""
    from examples.ablation.ablate import check_options
    from examples.tasks.command_line import exit_on
    from trl_ext.checkpoints import check_output_dir

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS, help="answers to a prompt")
    parser.add_argument("--steps", type=int, default=4, help=f"measurements of {PROMPTS} prompts")
    parser.add_argument("--train_steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="policies at the same time, one thread each")
    parser.add_argument("--output_dir", default="runs/rollout_noise")
    options = parser.parse_args(arguments)
    if bad := [group for group in options.groups if group < 2]:
        sys.exit(f"error: --groups {bad[0]} must be at least 2")
    with exit_on(ValueError):
        check_options(options, lists=["seeds", "groups"], positive=["steps", "train_steps", "jobs"])
        check_output_dir(options.output_dir)
    return options


def main(arguments: list[str]) -> None:
    from examples.ablation.runs import Workers, warm_up
    from examples.ablation.tables import write_csv

    options = parse_arguments(arguments)
    folder = Path(options.output_dir)
    (folder / "runs").mkdir(exist_ok=True)
    trained = {seed: folder / f"policy_seed{seed}_steps{options.train_steps}" for seed in options.seeds}
    calls = {path.name: (train_policy, seed, options.train_steps, str(path)) for seed, path in trained.items()}
    with Workers(options.jobs, 2 * len(options.seeds) * len(options.groups)) as workers:
        left = {name: call for name, call in calls.items() if not (folder / name).exists()}
        workers.each(left, lambda name: print(f"{name}: done", flush=True))
        workers.end_if_failed()
        wanted = {
            (seed, state, group): measurement(policy, seed, state, group, options.steps)
            for seed in options.seeds
            for state, policy in zip(STATES, (warm_up(seed, "mixture", []), str(trained[seed])), strict=True)
            for group in options.groups
        }
        runs = workers.run(options.output_dir, list(wanted.values()))
    workers.end_if_failed()

    rows = [
        {"seed": seed, "state": state, "group": group, **{name: row[name] for name in ("step", *COLUMNS)}}
        for (seed, state, group), run in zip(wanted, runs, strict=True)
        for row in run.rows
        if row["near_orthogonal_frac"] is not None
    ]
    write_csv(folder / "rollout_noise.csv", rows)
    (folder / "rollout_noise.md").write_text(table(rows))
    print(f"\n{table(rows)}\nWritten to {folder}: rollout_noise.csv, rollout_noise.md")


if __name__ == "__main__":
    main(sys.argv[1:])
