"""The runs of an ablation: each trained once in a worker process, its result one file; what has a file is done.

Flow: ``run`` finds what isn't done -> ``train`` in a worker -> ``write_whole`` -> ``read_run``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from ablation_results import Run, tidy_rows
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils import logging

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.correctness import Correctness
from trl_ext.tasks.questions import arithmetic_questions, build_dataset
from trl_ext.tasks.small_policy import small_policy

# All that one run depends on, as JSON can hold it: "method" (as on the command line), "model" (a folder; None: the
# built-in policy of the run's seed), "levels", "train_size", "eval_size" and "training", the options of the trainer
Settings = dict[str, Any]


# One run, in a worker process


def start_worker() -> None:
    """One thread, quiet, and no life after the parent's, however that ended."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def training_config(settings: Settings, output_dir: str) -> CurvatureGRPOConfig:
    return CurvatureGRPOConfig(**settings["training"], output_dir=output_dir)


def warm_up(seed: int, levels: list[int]) -> None:
    small_policy(seed, tuple(levels))


def train(settings: Settings, file: str) -> None:
    """Trains once, and writes the settings and the tidy rows to ``file``, whole or not at all."""
    levels, seed, model = tuple(settings["levels"]), settings["training"]["seed"], settings["model"]
    policy = str(small_policy(seed, levels)) if model is None else model
    train_set = arithmetic_questions(settings["train_size"], held_out=False, levels=levels, seed=seed)
    held_out = arithmetic_questions(settings["eval_size"], held_out=True, levels=levels, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CurvatureGRPOTrainer(
            model=policy,
            reward_funcs=[Correctness()],
            args=training_config(settings, scratch),
            train_dataset=build_dataset(train_set, "chat"),
            eval_dataset=build_dataset(held_out, "chat"),
            processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    write_whole(Path(file), json.dumps({"settings": settings, "rows": tidy_rows(trainer.state.log_history)}))


def write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


# All runs: those with a file are done, the others go to the workers


def run_file(output_dir: str | Path, settings: Settings) -> Path:
    """Where a run's result lies; other settings, another file."""
    training = settings["training"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    method = settings["method"].replace(":", "-")
    name = f"{method}_lr{training['learning_rate']:g}_seed{training['seed']}_{digest}.json"
    return Path(output_dir) / "runs" / name


def read_run(output_dir: str | Path, settings: Settings) -> Run | None:
    """The ``Run``, or None where it isn't done: no file, or one that was cut off."""
    try:
        rows = json.loads(run_file(output_dir, settings).read_text())["rows"]
    except (OSError, ValueError):
        return None
    return Run(settings["method"], settings["training"]["learning_rate"], settings["training"]["seed"], rows)


class Workers:
    """Worker processes, and how many of the runs are done, for the line that says when it will end."""

    def __init__(self, jobs: int, total: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker)
        self.total, self.done, self.trained = total, 0, 0
        self.failed: list[str] = []
        self.started = time.monotonic()

    def stop(self) -> None:
        """Ends the workers in the middle of what they do."""
        for worker in multiprocessing.active_children():
            worker.terminate()

    def _each(self, calls: dict[str, tuple[Any, ...]], report: Callable[[str], None]) -> None:
        """Calls everything in the workers; ``report(name)`` as each ends, a failure is named and kept."""
        futures = {self.pool.submit(*call): name for name, call in calls.items()}
        for future in as_completed(futures):
            try:
                future.result()
            except BrokenExecutor:
                raise RuntimeError(
                    "a worker process was killed (out of memory?); repeat the command to go on"
                ) from None
            except Exception as error:
                self.failed.append(futures[future])
                print(f"FAILED {futures[future]}: {type(error).__name__}: {error}", flush=True)
            else:
                report(futures[future])

    def warm_up(self, seeds: Iterable[int], levels: list[int]) -> None:
        calls = {f"policy of seed {seed}": (warm_up, seed, levels) for seed in sorted(set(seeds))}
        if calls:
            print(f"The built-in policies of {len(calls)} seeds, about two minutes each unless cached:", flush=True)
        self._each(calls, lambda name: print(f"  {name} is there", flush=True))
        self.started = time.monotonic()

    def run(self, output_dir: str, wanted: Sequence[Settings]) -> list[Run]:
        """The ``Run`` of each of the settings, trained where it isn't there yet; without those that failed."""
        calls, by_name = {}, {}
        for settings in wanted:
            training = settings["training"]
            name = f"{settings['method']} at {training['learning_rate']:g}, seed {training['seed']}"
            by_name[name] = settings
            if read_run(output_dir, settings) is None:
                calls[name] = (train, settings, str(run_file(output_dir, settings)))
            else:
                self.done += 1
        if len(calls) < len(wanted):
            print(f"{len(wanted) - len(calls)} of {len(wanted)} runs were done before", flush=True)

        def report(name: str) -> None:
            self.done += 1
            self.trained += 1
            run = read_run(output_dir, by_name[name])
            assert run is not None
            accuracies = run.curve("held_out_accuracy")[1]
            left = (time.monotonic() - self.started) / self.trained * (self.total - self.done)
            print(
                f"[{self.done}/{self.total}] {name}: held-out accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f}, "
                f"about {left / 60:.0f} min left",
                flush=True,
            )

        self._each(calls, report)
        return [run for settings in wanted if (run := read_run(output_dir, settings))]
