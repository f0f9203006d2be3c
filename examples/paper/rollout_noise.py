"""How much of the prompts' orthogonality is rollout noise? ``python examples/paper/rollout_noise.py``.

The same prompts, answered 4 to 64 times each by the built-in policy, before training and after it; nothing is learned
while measuring (learning rate 0). A prompt's gradient from few answers is noisy, and noise is orthogonal to everything:
raw cosines grow with G where prompts really overlap, the alignment shouldn't. Writes ``rollout_noise.csv`` and
``rollout_noise.md``; repeat an interrupted command to go on.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext import CurvatureGRPOTrainer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

Row = dict[str, str]  # of the CSV
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


def trained(model: str, seed: int, output_dir: str, **options: Any) -> CurvatureGRPOTrainer:
    """Trains on the mixture by the demo's recipe without evaluation and with these options."""
    from examples.ablation.train import DEFAULTS, Task, make_trainer
    from trl_ext import CurvatureGRPOConfig

    never = {"eval_strategy": "no", "eval_on_start": False, "metric_for_best_model": None}
    own = {"optim": "adamw_torch_fused", "seed": seed, "output_dir": output_dir}  # that of the committed numbers
    args = CurvatureGRPOConfig(**{**DEFAULTS, **never, **own, **options})
    trainer = make_trainer(Task(model_name_or_path=model, eval_size=4), args)
    trainer.train()
    return trainer


def trained_policy(seed: int, steps: int, folder: Path) -> str:
    """Returns a seed's policy after training; trained on the first call, and saved whole or not at all."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            trainer = trained("small", seed, scratch, max_steps=steps, interference_every=0)
            trainer.save_model(scratch)
            trainer.processing_class.save_pretrained(scratch)
            Path(scratch).rename(folder)
            Path(scratch).mkdir()
    return str(folder)


def measure(policy: str, seed: int, state: str, group: int, steps: int) -> list[Row]:
    """Measures one policy with one group size; nothing is learned. Returns a row for each step."""
    from examples.ablation.curves import tidy_rows

    answers = {"num_generations": group, "per_device_train_batch_size": PROMPTS * group}
    exact = {"interference_every": 1, "interference_dim": 0, "what_if": []}
    with tempfile.TemporaryDirectory() as folder:
        # a draw of its own: some of the prompts may have been trained on
        trainer = trained(policy, seed + 1000, folder, learning_rate=0.0, max_steps=steps, **answers, **exact)
    rows = [row for row in tidy_rows(trainer.state.log_history) if row["near_orthogonal_frac"] is not None]
    place = {"seed": str(seed), "state": state, "group": str(group)}
    return [place | {name: "" if row[name] is None else str(row[name]) for name in ("step", *COLUMNS)} for row in rows]


def table(rows: Sequence[Row]) -> str:
    """``rollout_noise.md``: means over seeds of means over steps, with 95% intervals."""
    from examples.ablation.curves import mean_interval
    from examples.ablation.tables import markdown
    from examples.paper.phases_results import plus_minus

    def cell(state: str, group: int, name: str) -> str:
        by_seed: dict[str, list[float]] = {}
        for row in rows:
            if (row["state"], row["group"]) == (state, str(group)) and row[name]:
                by_seed.setdefault(row["seed"], []).append(float(row[name]))
        return plus_minus(mean_interval([statistics.fmean(values) for values in by_seed.values()])) if by_seed else ""

    places = product(dict.fromkeys(row["state"] for row in rows), sorted({int(row["group"]) for row in rows}))
    cells = [[state, str(group), *(cell(state, group, name) for name in COLUMNS)] for state, group in places]
    return "\n".join([*markdown(["", "G", *COLUMNS.values()], cells), ""])


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Ends the program where an argument is wrong."""
    from examples.tasks.command_line import check_options, exit_on
    from trl_ext.checkpoints import check_output_dir

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS, help="answers to a prompt")
    parser.add_argument("--steps", type=int, default=4, help=f"measurements of {PROMPTS} prompts")
    parser.add_argument("--train_steps", type=int, default=60)
    parser.add_argument("--output_dir", default="runs/rollout_noise")
    options = parser.parse_args(arguments)
    if bad := [group for group in options.groups if group < 2]:
        sys.exit(f"error: --groups {bad[0]} must be at least 2")
    with exit_on(ValueError):
        check_options(options, lists=["seeds", "groups"], positive=["steps", "train_steps"])
        check_output_dir(options.output_dir)
    return options


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    import trl_ext  # noqa: F401 - before transformers: it keeps a start quiet
    from examples.tasks.mixed_policy import mixed_policy
    from trl_ext.ablate.page import write_csv

    folder = Path(options.output_dir)
    file = folder / "rollout_noise.csv"
    rows: list[Row] = []
    if file.exists():
        with open(file, newline="") as stream:
            rows = list(csv.DictReader(stream))
    for seed, state, group in product(options.seeds, STATES, options.groups):
        if any((row["seed"], row["state"], row["group"]) == (str(seed), state, str(group)) for row in rows):
            continue
        after = folder / f"policy_seed{seed}_steps{options.train_steps}"
        policy = str(mixed_policy(seed)) if state == STATES[0] else trained_policy(seed, options.train_steps, after)
        rows += measure(policy, seed, state, group, options.steps)
        write_csv(file, rows)
        print(f"seed {seed}, {state}, G = {group}: done", flush=True)
    (folder / "rollout_noise.md").write_text(table(rows))
    print(f"\n{table(rows)}\nWritten to {folder}: rollout_noise.csv, rollout_noise.md")


if __name__ == "__main__":
    main(sys.argv[1:])
