"""The runs of an ablation: each is trained once in a worker process, and its result is a file. What has one is done.

``Workers.run`` finds the runs that aren't done, warms the policies up that they start from, and trains them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trl_ext  # noqa: F401 - before transformers: it keeps a start quiet

# isort: split
import torch
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils import logging

from examples.ablation.curves import Run, tidy_rows
from examples.tasks.correctness import Correctness, SameText
from examples.tasks.mixed_policy import mixed_policy
from examples.tasks.questions import build_dataset, built_in_questions
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.small_policy import small_policy


@dataclass(frozen=True)
class Settings:
    """All that one run depends on.

    Attributes:
        method: as on the command line.
        training: the trainer's options.
        model: a folder; None: the built-in policy of the run's seed.
    """

    method: str
    training: dict[str, object]
    model: str | None = None
    dataset: str = "mixture"
    levels: Sequence[int] = ()
    train_size: int = 700
    eval_size: int = 128
    reward_noise: float = 0.0

    @property
    def seed(self) -> int:
        return self.training["seed"]

    @property
    def learning_rate(self) -> float:
        return self.training["learning_rate"]

    @property
    def name(self) -> str:
        return f"{self.method} at {self.learning_rate:g}, seed {self.seed}"


# One run, in a worker process


def start_worker() -> None:
    """Sets up a worker process: one thread, no messages, and an end when the parent ends, however that happens."""
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


def warm_up(seed: int, dataset: str, levels: Sequence[int]) -> str:
    """Returns the folder of the built-in policy; made on the first call."""

    def silent(step: int, accuracy: object) -> None:
        pass

    return str(mixed_policy(seed, silent) if dataset == "mixture" else small_policy(seed, tuple(levels), silent))


class Flipped:
    """A reward that is 1 - itself in a share of the answers, where the dataset's column ``noisy`` is true; ``accuracy``
    is logged as it is."""

    __name__ = "flipped"

    def __init__(self, reward: Correctness, share: float, seed: int) -> None:
        self.reward, self.share, self.random = reward, share, random.Random(seed)

    def __call__(self, completions: list, noisy: list[bool], **kwargs: Any) -> list[float]:
        rewards = self.reward(completions, **kwargs)
        return [
            1 - reward if flip and self.random.random() < self.share else reward
            for flip, reward in zip(noisy, rewards, strict=True)
        ]


def trained(settings: Settings, output_dir: str) -> CurvatureGRPOTrainer:
    """Trains once, without messages, and returns the trainer."""
    dataset, seed = settings.dataset, settings.seed
    policy = settings.model or warm_up(seed, dataset, settings.levels)
    judge: Any = SameText() if dataset == "mixture" else Correctness()
    datasets = []
    for count, held_out in ((settings.train_size, False), (settings.eval_size, True)):
        questions = built_in_questions(dataset, count, held_out=held_out, levels=tuple(settings.levels), seed=seed)
        made = build_dataset(questions, "chat")
        # rewards are flipped in training alone
        datasets.append(made.add_column("noisy", [not held_out] * count) if settings.reward_noise else made)
    trainer = CurvatureGRPOTrainer(
        model=policy,
        reward_funcs=[Flipped(judge, settings.reward_noise, seed) if settings.reward_noise else judge],
        args=CurvatureGRPOConfig(**settings.training, output_dir=output_dir),
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def train(settings: Settings, file: str) -> None:
    """Trains once, and writes the settings and the tidy rows to ``file``, whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trained(settings, scratch)
    write_whole(Path(file), json.dumps({"settings": asdict(settings), "rows": tidy_rows(trainer.state.log_history)}))


def write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


# All runs: those with a file are done, the others go to the workers


def run_file(output_dir: str | Path, settings: Settings) -> Path:
    """Returns the file of a run's result. Other settings have another file."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:10]
    method = settings.method.replace(":", "-").replace(" ", "_")
    return Path(output_dir) / "runs" / f"{method}_lr{settings.learning_rate:g}_seed{settings.seed}_{digest}.json"


def read_run(output_dir: str | Path, settings: Settings) -> Run | None:
    """Reads a run's result. Returns None where there is no file, or one that was cut off."""
    try:
        rows = json.loads(run_file(output_dir, settings).read_text())["rows"]
    except (OSError, ValueError):
        return None
    return Run(settings.method, settings.learning_rate, settings.seed, rows)


class Workers:
    """Worker processes that train runs, and what became of them; a context that ends them."""

    def __init__(self, jobs: int, total: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker)
        self.total, self.done, self.trained = total, 0, 0
        self.failed: list[str] = []
        self.started = time.monotonic()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Waits for the workers; on Ctrl-C ends them in the middle of what they do, and the program."""
        if kind is KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            sys.exit("\nStopped. What has finished is kept: repeat the command to go on")
        self.pool.shutdown(cancel_futures=True)

    def each(self, calls: Mapping[str, tuple], report: Callable[[str], None]) -> None:
        """Makes the calls, by name, in the workers. ``report(name)`` as each ends; a failure is printed and kept."""
        names = {self.pool.submit(*call): name for name, call in calls.items()}
        for future in as_completed(names):
            try:
                future.result()
            except BrokenExecutor:
                sys.exit("error: a worker process was killed (out of memory?); repeat the command to go on")
            except Exception as error:
                self.failed.append(names[future])
                print(f"FAILED {names[future]}: {type(error).__name__}: {error}", flush=True)
            else:
                report(names[future])

    def end_if_failed(self) -> None:
        """Ends the program where calls have failed, and names them."""
        if self.failed:
            sys.exit(f"error: {len(self.failed)} failed: {'; '.join(self.failed)}")

    def run(self, output_dir: str, wanted: Sequence[Settings]) -> list[Run]:
        """Returns the ``Run`` of each of the settings, trained where it isn't there yet; without those that failed."""
        left = [settings for settings in wanted if read_run(output_dir, settings) is None]
        if len(left) < len(wanted):
            self.done += len(wanted) - len(left)
            print(f"{len(wanted) - len(left)} of {len(wanted)} runs were done before", flush=True)
        self._warm_up(left)
        by_name = {settings.name: settings for settings in left}
        calls = {name: (train, one, str(run_file(output_dir, one))) for name, one in by_name.items()}
        self.each(calls, lambda name: self._report(name, read_run(output_dir, by_name[name])))
        return [run for settings in wanted if (run := read_run(output_dir, settings))]

    def _warm_up(self, settings: Sequence[Settings]) -> None:
        """Makes the built-in policies that runs start from, each once."""
        built_in = {one.seed: one for one in settings if one.model is None}
        if built_in:
            print(
                f"The built-in policies of {len(built_in)} seeds are warmed up where they aren't cached: a minute and "
                "a half each on one core (measured)",
                flush=True,
            )
        calls = {f"policy of seed {seed}": (warm_up, seed, one.dataset, one.levels) for seed, one in built_in.items()}
        self.each(calls, lambda name: print(f"  {name} is there", flush=True))

    def _report(self, name: str, run: Run | None) -> None:
        assert run is not None
        self.done += 1
        self.trained += 1
        accuracies = run.curve("held_out_accuracy")[1]
        learned = f": held-out accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f}" if accuracies else ""
        left = (time.monotonic() - self.started) / self.trained * (self.total - self.done)
        print(f"[{self.done}/{self.total}] {name}{learned}, about {left / 60:.0f} min left", flush=True)
