"""Trains healthy runs with full logs, for false alarms: ``python examples/ablation/healthy_runs.py``.

Twenty seeds, each with a policy of its own on sums to 20: the built-in one of ``small_policy``, narrower and warmed up
for fewer steps, so that it takes 15 s. Ten runs are the demo's recipe (``std``, AdamW), two each differ in one way, as
real runs do (``VARIANTS``). Each has 60 steps, logs every step, measures interference at every third and evaluates at
every fifth.

``results/healthy_runs.csv`` holds what the signatures read of the log, ``results/healthy_grams.csv`` the inner products
of the prompts' gradients. What is trained stays in ``--output_dir``: repeat an interrupted command to go on.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from grpo_kernels.recorder.files import InterferenceRecord

RESULTS = Path(__file__).parent / "results"
LOGS, GRAMS = RESULTS / "healthy_runs.csv", RESULTS / "healthy_grams.csv"
SEEDS = range(20, 40)
RECIPE: dict[str, Any] = {"normalization": "std", "learning_rate": 2e-4}
# two seeds each; the other half of the seeds trains by the recipe as it is
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {"normalization": "mean", "learning_rate": 1e-4},
    "SGD, no clipping": {"learning_rate": 0.01, "optim": "sgd", "max_grad_norm": 0.0},
    "10 % of the rewards flipped": {"reward_noise": 0.1},
    "beta = 0.02": {"beta": 0.02},
    "two iterations": {"num_iterations": 2},
}
STEPS, MEASURED, EVALUATED = 60, 3, 5  # in all; between two measurements of interference; between two evaluations
LEVELS, PROBLEMS, HELD_OUT = (1,), 350, 70  # sums to 20: there are hardly more
NARROW, WARM_UP_STEPS, LEARNED = {"hidden_size": 128, "intermediate_size": 384}, 400, 0.8
# what signatures read of the log
COLUMNS = (
    "loss reward reward_std accuracy grad_norm kl entropy entropy_live epoch eval_accuracy eval_reward "
    "frac_reward_zero_std clip_ratio/region_mean completions/repetition completions/clipped_ratio "
    "completions/mean_length completions/max_length normalization/all_wrong_frac normalization/all_right_frac "
    "normalization/zero_variance_frac normalization/unscorable_frac normalization/scale_min normalization/scale_mean "
    "normalization/advantage_max interference/live_prompts interference/coverage interference/sketch_rmse "
    "interference/sketch_check interference/alignment interference/alignment_trained interference/reliability "
    "curvature/directional_corr curvature/speedup_constant compute/seconds_generation compute/seconds_rewards "
    "compute/seconds_log_probs compute/seconds_training"
).split()


def variant(seed: int) -> str:
    """The name of a seed's variant, or "recipe"."""
    place = seed - SEEDS[0]
    return "recipe" if place < 10 else list(VARIANTS)[(place - 10) // 2]


def policy(seed: int, folder: Path) -> str:
    """The folder of a seed's policy, warmed up on the first call."""
    from trl_ext.tasks import small_policy

    if not folder.is_dir():
        small_policy.MODEL.update(NARROW)
        small_policy.LEARNING_STEPS, small_policy.LEARNED_ACCURACY = WARM_UP_STEPS, LEARNED
        small_policy.save_atomically(folder, *small_policy.warm_up(seed, LEVELS)[:2])
    return str(folder)


def train_one(seed: int, file: Path) -> None:
    """Trains a seed's run and writes its log and inner products to ``file``."""
    from examples.ablation.train import DEFAULTS, Task, make_trainer
    from grpo_kernels.recorder.files import read_interference
    from trl_ext import CurvatureGRPOConfig
    from trl_ext.ablate.study import write_whole

    changes = {**RECIPE, **VARIANTS.get(variant(seed), {})}
    noise = changes.pop("reward_noise", 0.0)
    model = policy(seed, file.with_name(f"policy{seed}"))
    task = Task("arithmetic", list(LEVELS), model, PROBLEMS, HELD_OUT, noise)
    steps = {"max_steps": STEPS, "interference_every": MEASURED, "eval_steps": EVALUATED, "max_completion_length": 4}
    with tempfile.TemporaryDirectory() as scratch:
        options = {**DEFAULTS, **steps, **changes, "seed": seed, "output_dir": scratch}
        trainer = make_trainer(task, CurvatureGRPOConfig(**options))
        trainer.train()
        logs = trainer.state.log_history
        records = read_interference(scratch)
    grams = [{"step": one.step, "gram": one.gram_PP.tolist()} for one in records]
    write_whole(file, json.dumps({"logs": logs, "grams": grams}))


def log_rows(seed: int, logs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in logs:
        if "train_runtime" not in entry:
            numbers = {name: "" if entry.get(name) is None else f"{float(entry[name]):.5g}" for name in COLUMNS}
            yield {"seed": seed, "variant": variant(seed), "step": entry["step"], **numbers}


def gram_rows(seed: int, grams: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each prompt with a gradient: its inner products with those before it and with itself, over the mean
    squared norm of the step's prompts."""
    for one in grams:
        gram = np.array(one["gram"])
        live = np.flatnonzero(np.diag(gram) > 0)
        scale = float(np.diag(gram)[live].mean()) if len(live) else 1.0
        for place, i in enumerate(live):
            products = " ".join(f"{gram[i, j] / scale:.3g}" for j in live[: place + 1])
            yield {"seed": seed, "step": one["step"], "prompts": len(gram), "inner_products": products}


def read_logs() -> dict[int, list[dict[str, float]]]:
    """The committed logs: seed -> lines, as TRL's ``log_history`` has them."""
    logs: dict[int, list[dict[str, float]]] = {}
    with open(LOGS, newline="") as stream:
        for row in csv.DictReader(stream):
            line = {name: float(row[name]) for name in COLUMNS if row.get(name)}
            logs.setdefault(int(row["seed"]), []).append({"step": int(row["step"]), **line})
    return logs


def read_records() -> dict[int, list[InterferenceRecord]]:
    """The committed inner products: seed -> measured steps."""
    rows: dict[tuple[int, int], list[dict[str, str]]] = {}
    with open(GRAMS, newline="") as stream:
        for row in csv.DictReader(stream):
            rows.setdefault((int(row["seed"]), int(row["step"])), []).append(row)
    records: dict[int, list[InterferenceRecord]] = {}
    for (seed, step), live in rows.items():
        prompts = int(live[0]["prompts"])
        gram = np.zeros((prompts, prompts))
        for i, row in enumerate(live):
            gram[i, : i + 1] = gram[: i + 1, i] = [float(number) for number in row["inner_products"].split()]
        records.setdefault(seed, []).append(make_record(step, gram))
    return records


def make_record(step: int, gram_PP: np.ndarray) -> InterferenceRecord:
    """A measured step of these inner products, with eight answers to a prompt; even and odd prompts
    count as two tasks, which are alike."""
    ids = np.arange(len(gram_PP))
    nothing = np.zeros(0)
    return InterferenceRecord(
        step=step,
        prompt_id_P=ids,
        prompt_key_P=ids,
        prompt_text_P=None,
        gram_PP=gram_PP,
        trace_P=nothing,
        sigma_P=nothing,
        gram_BB=None,
        prompt_B=np.repeat(ids, 8),
        reward_B=np.full(1, 0.5),  # not read: the log has every step's
        coefficient_B=None,
        metrics={},
        task_P=[("even", "odd")[i % 2] for i in ids],
    )


def main() -> None:
    import torch

    from trl_ext.ablate.page import write_csv

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/healthy")
    folder = Path(parser.parse_args().output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    files = {seed: folder / f"seed{seed}.json" for seed in SEEDS}
    for seed, file in files.items():
        if not file.is_file():
            print(f"seed {seed}: {variant(seed)}", flush=True)
            train_one(seed, file)
    found = {seed: json.loads(file.read_text()) for seed, file in files.items()}
    write_csv(LOGS, [row for seed, one in found.items() for row in log_rows(seed, one["logs"])])
    write_csv(GRAMS, [row for seed, one in found.items() for row in gram_rows(seed, one["grams"])])


if __name__ == "__main__":
    main()
