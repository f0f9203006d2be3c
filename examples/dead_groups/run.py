"""Trains the arms of dead_groups.md: ``python examples/dead_groups/run.py screen``, then ``confirm``.

Repeat an interrupted command to go on. Two processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONSAFEPATH"] = "1"  # worker processes must not find this folder's modules first

from examples.dead_groups.costs import PRICES, area, reached

NAMES = ("std", "none", "resample", "choose", "oracle")  # of the arms
TUNING_SEEDS = (100, 101)
SCREEN_SEEDS = (0, 1, 2, 3)
CONFIRM_SEEDS = tuple(range(20, 32))
RATES = (1e-4, 2e-4, 4e-4)
MORE_RATES = 2  # beyond an edge
EVALUATE_EVERY = 12  # steps
MOST_STEPS = 120
TRAINING: dict[str, Any] = {
    **{"num_generations": 8, "per_device_train_batch_size": 128, "gradient_accumulation_steps": 1},
    **{"max_completion_length": 5, "max_steps": MOST_STEPS, "lr_scheduler_type": "constant_with_warmup"},
    **{
        "warmup_steps": 5,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "interference_every": 0,
        "report_to": "none",
    },
    **{"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "eval_strategy": "no"},
}


@dataclass(frozen=True)
class Job:
    setting: str
    arm: str
    rate: float
    seed: int

    def file(self, folder: Path) -> Path:
        return folder / f"{self.setting}_{self.arm}_lr{self.rate:g}_seed{self.seed}.json"


def train(job: Job) -> list[dict[str, Any]]:
    """Trains a run. Returns a row for each evaluation."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)
    from examples.dead_groups.arms import ARMS, ChoosingTrainer, CountingTrainer, OracleTrainer
    from examples.dead_groups.settings import SETTINGS, Rewards, pass_rates, prepare
    from examples.tasks.questions import build_dataset
    from trl_ext import CurvatureGRPOConfig

    setting = SETTINGS[job.setting]
    prepared = prepare(setting, job.seed)
    kind: type = {"choose": ChoosingTrainer, "oracle": OracleTrainer}.get(job.arm, CountingTrainer)
    rows: list[dict[str, Any]] = []

    class Evaluate(TrainerCallback):
        """Evaluates by exact pass rates, and ends the run at the largest budget."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            costs = {"generated": trainer.generated, "trained": trainer.trained}
            done = reached(setting.task, costs)
            if state.global_step % EVALUATE_EVERY == 0 or done:
                self.evaluate(state.global_step)
            control.should_training_stop = done

        def evaluate(self, step: int) -> None:
            rates = pass_rates(trainer.model, tokenizer, prepared.held_out)
            names = ("generated", "trained", "groups", "live_groups", "true_live_groups", "expected")
            counts = {name: getattr(trainer, name, 0) for name in names}
            logged = trainer._metrics["train"]  # nothing is logged, so that it has all steps
            spent = {name: sum(logged[f"compute/seconds_{name}"]) for name in ("generation", "training")}
            rows.append({"step": step, **counts, **spent, "accuracy": float(rates.mean()), **strata(rates)})

    def strata(rates: torch.Tensor) -> dict[str, float]:
        before = prepared.held_out_rates
        parts = {"never": before < 0.02, "hard": (before >= 0.02) & (before < 0.3)}
        parts |= {"middle": (before >= 0.3) & (before < 0.9), "always": before >= 0.9}
        return {name: float(rates[part].mean()) if part.any() else float("nan") for name, part in parts.items()}

    with tempfile.TemporaryDirectory() as folder:
        args = CurvatureGRPOConfig(
            output_dir=folder, learning_rate=job.rate, seed=job.seed, **TRAINING, **ARMS[job.arm]
        )
        tokenizer = AutoTokenizer.from_pretrained(prepared.policy, padding_side="left")
        scorer = Rewards(setting.flips, job.seed)
        trainer = kind(
            model=str(prepared.policy),
            reward_funcs=[scorer],
            args=args,
            train_dataset=build_dataset(prepared.train, "chat"),
            processing_class=tokenizer,
        )
        trainer.scorer = scorer
        if isinstance(trainer, ChoosingTrainer):
            trainer.begin(job.seed)
        if isinstance(trainer, OracleTrainer):
            trainer.questions = prepared.train
        callback = Evaluate()
        trainer.add_callback(callback)
        callback.evaluate(0)
        trainer.train()
    return rows


def run(job: Job, folder: Path) -> None:
    """Trains a run and writes its rows, unless they are there. One that fails or diverges has no accuracy any more."""
    file = job.file(folder)
    if not file.exists():
        rows = train(job)
        scratch = file.with_suffix(".new")
        scratch.write_text(json.dumps(rows))
        scratch.rename(file)
        print(
            f"{file.stem}: {rows[0]['accuracy']:.3f} -> {rows[-1]['accuracy']:.3f}, step {rows[-1]['step']}", flush=True
        )


def _run(both: tuple[Job, Path]) -> None:
    run(*both)


def score(job: Job, folder: Path) -> float:
    """The mean accuracy over the run, at equal cost, over the prices."""
    rows = json.loads(job.file(folder).read_text())
    return statistics.fmean(area(rows, task_of(job.setting), price) for price in PRICES)


def task_of(setting: str) -> str:
    """Returns the kind of questions of a setting; budgets depend on it."""
    return "wide" if setting.startswith("wide") else "mixture"


class Runner:
    """Runs jobs in two processes."""

    def __init__(self, folder: Path, pool: Any) -> None:
        self.folder, self.pool = folder, pool

    def all(self, jobs: Iterable[Job]) -> None:
        for _ in self.pool.imap_unordered(_run, [(job, self.folder) for job in jobs]):
            pass

    def rates(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Chooses a rate for each setting and arm on the tuning seeds; a best rate at the edge has others tried."""
        tried = {pair: list(RATES) for pair in pairs}
        best: dict[tuple[str, str], float] = {}
        for _ in range(1 + MORE_RATES):
            self.all(Job(*pair, rate, seed) for pair, rates in tried.items() for rate in rates for seed in TUNING_SEEDS)
            done = True
            for pair, rates in tried.items():
                scores = {
                    rate: statistics.fmean(score(Job(*pair, rate, seed), self.folder) for seed in TUNING_SEEDS)
                    for rate in rates
                }
                best[pair] = max(scores, key=scores.__getitem__)
                beyond = best[pair] * (2 if best[pair] == max(rates) else 0.5)
                if best[pair] in (min(rates), max(rates)):
                    tried[pair], done = [*rates, beyond], False
            if done:
                break
        return best


def main(arguments: Sequence[str]) -> None:
    from examples.dead_groups.settings import SETTINGS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("screen", "confirm"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rate", type=float, help="of all arms, in place of a sweep")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the part's")
    parser.add_argument("--folder", type=Path, default=Path("runs/dead_groups"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or (SCREEN_SEEDS if options.part == "screen" else CONFIRM_SEEDS)
    pairs = [(setting, arm) for setting in options.settings for arm in options.arms]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        runner = Runner(options.folder, pool)
        rates = dict.fromkeys(pairs, options.rate) if options.rate else runner.rates(pairs)
        runner.all(Job(*pair, rates[pair], seed) for pair in pairs for seed in seeds)


if __name__ == "__main__":
    main(sys.argv[1:])
