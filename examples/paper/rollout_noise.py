"""How much of the prompts' orthogonality is rollout noise? ``python examples/paper/rollout_noise.py``.

The same prompts, answered 4 to 64 times each by the built-in policy, before training and after it; nothing is learned
while measuring (learning rate 0). A prompt's gradient from few answers is noisy, and noise is orthogonal to everything:
raw cosines grow with G where prompts really overlap, corrected ones shouldn't. Writes ``rollout_noise.csv`` and
``rollout_noise.md``; repeat an interrupted command to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as in ablate.py
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONSAFEPATH"] = "1"

GROUPS = [4, 8, 16, 32, 64]
PROMPTS = 16  # of a step
TRAINED = "after training"
COLUMNS = {
    "near_orthogonal_frac": "near-orthogonal",
    "cos_abs_mean": "mean abs cosine",
    "cos_std": "std of cosines",
    "cos_corrected_std": "std, corrected",
    "cos_mean": "mean cosine",
    "cos_corrected_mean": "mean, corrected",
    "reliability": "reliability",
    "live_prompts": "live prompts",
}


def settings_of(model: str | None, seed: int, **training: Any) -> dict[str, Any]:
    """The settings of a run on the mixture: the demo's recipe without evaluation, with these options."""
    from examples.ablation.ablate import demo_training

    options = {"logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    recipe = demo_training()
    recipe.pop("metric_for_best_model")
    return {
        "model": model,
        "dataset": "mixture",
        "levels": [],
        "train_size": 700,
        "eval_size": 4,  # never asked
        "training": recipe | options | training | {"seed": seed},
    }


def train_policy(seed: int, steps: int, folder: str) -> None:
    """Trains a seed's policy and saves it, whole or not at all."""
    from examples.ablation.runs import trained

    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        trainer = trained(settings_of(None, seed, max_steps=steps, interference_every=0), scratch)
        trainer.save_model(scratch)
        trainer.processing_class.save_pretrained(scratch)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()


def measure(seed: int, state: str, policy: str | None, group: int, steps: int, file: str) -> None:
    """Measures one policy with one group size, and writes a row for each step to a file of its own."""
    from examples.ablation.runs import trained, warm_up, write_whole

    settings = settings_of(
        policy or warm_up(seed, "mixture", []),
        seed + 1000,  # a draw of its own: some of the prompts may have been trained on
        learning_rate=0.0,
        max_steps=steps,
        num_generations=group,
        per_device_train_batch_size=PROMPTS * group,
        interference_every=1,
        interference_dim=0,
        what_if=[],
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trained(settings, scratch)
    rows = [
        {"seed": seed, "state": state, "group": group, "step": log["step"]}
        | {name: log.get(f"interference/{name}") for name in COLUMNS}
        for log in trainer.state.log_history
        if "interference/near_orthogonal_frac" in log
    ]
    write_whole(Path(file), json.dumps(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """``rollout_noise.md``: means over seeds of means over steps, with 95% intervals."""
    from examples.ablation.curves import mean_interval

    lines = [f"| | G | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for state in dict.fromkeys(row["state"] for row in rows):
        for group in sorted({row["group"] for row in rows}):
            cells = []
            for name in COLUMNS:
                by_seed: dict[int, list[float]] = {}
                for row in rows:
                    if (row["state"], row["group"]) == (state, group) and row[name] is not None:
                        by_seed.setdefault(row["seed"], []).append(row[name])
                if not by_seed:
                    cells.append("")
                    continue
                one = mean_interval([statistics.fmean(values) for values in by_seed.values()])
                error = "" if len(by_seed) < 2 else f" +- {one.high - one.estimate:.3f}"
                cells.append(f"{one.estimate:.3f}{error}")
            lines.append(f"| {state} | {group} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Ends the program where an argument is wrong."""
    from examples.ablation.ablate import check_options
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
    try:
        check_options(options, lists=["seeds", "groups"], positive=["steps", "train_steps", "jobs"])
        check_output_dir(options.output_dir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return options


def tell(name: str) -> None:
    print(f"{name}: done", flush=True)


def main(arguments: list[str]) -> None:
    from examples.ablation.runs import Workers
    from examples.ablation.tables import write_csv

    options = parse_arguments(arguments)
    folder = Path(options.output_dir)
    (folder / "runs").mkdir(exist_ok=True)
    trained = {seed: folder / f"policy_seed{seed}_steps{options.train_steps}" for seed in options.seeds}
    files, tasks = [], []
    for seed in options.seeds:
        for state, policy in (("before training", None), (TRAINED, str(trained[seed]))):
            for group in options.groups:
                after = options.train_steps if policy else 0
                file = folder / "runs" / f"seed{seed}_after{after}_G{group}_steps{options.steps}.json"
                files.append(file)
                if not file.exists():
                    tasks.append((seed, state, policy, group, options.steps, str(file)))
    policies = {f"policy of seed {s}": (train_policy, s, options.train_steps, str(path)) for s, path in trained.items()}
    with Workers(options.jobs, total=len(tasks)) as workers:
        workers.each({name: call for name, call in policies.items() if not Path(call[-1]).exists()}, tell)
        print(f"{len(files)} measurements, {len(files) - len(tasks)} done before", flush=True)
        workers.each({Path(task[-1]).stem: (measure, *task) for task in tasks}, tell)
    if workers.failed:
        sys.exit(f"error: {len(workers.failed)} failed: {'; '.join(workers.failed)}")

    rows = [row for file in files for row in json.loads(file.read_text())]
    write_csv(folder / "rollout_noise.csv", rows)
    (folder / "rollout_noise.md").write_text(table(rows))
    print(f"\n{table(rows)}\nWritten to {folder}: rollout_noise.csv, rollout_noise.md")


if __name__ == "__main__":
    main(sys.argv[1:])
