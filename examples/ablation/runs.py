"""The runs of an ablation: each trained once in a worker process, its result one file; what has a file is done.

Flow: ``run`` finds what isn't done -> ``warm_up`` and ``train`` in workers, as soon as each can begin, telling how far
they are -> ``write_whole`` -> ``read_run``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl_ext  # noqa: F401 - before transformers: it keeps a start quiet

# isort: split
import torch
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from examples.ablation.curves import Run, tidy_rows
from examples.ablation.progress import AblationProgress
from examples.tasks.correctness import Correctness, SameText
from examples.tasks.mixed_policy import LEARNING_STEPS as MIXED_STEPS
from examples.tasks.mixed_policy import mixed_policy
from examples.tasks.questions import arithmetic_questions, build_dataset, mixture_questions
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.small_policy import LEARNING_STEPS as ARITHMETIC_STEPS
from trl_ext.tasks.small_policy import small_policy

# All that one run depends on, as JSON can hold it: "method" (as on the command line), "model" (a folder; None: the
# built-in policy of the run's seed), "dataset", "levels", "train_size", "eval_size", "training" (the trainer's
# options), and "reward_noise" where rewards are flipped
Settings = dict[str, Any]
LEARNING_STEPS = {"mixture": MIXED_STEPS, "arithmetic": ARITHMETIC_STEPS}  # of a warm-up


# One run, in a worker process


_reports: Any = None  # of a worker: where it tells (name, done, of how many steps)


def start_worker(reports: Any) -> None:
    """One thread, quiet, and no life after the parent's, however that ended."""
    global _reports
    _reports = reports
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


class Tell(TrainerCallback):
    """Each optimizer step."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step_end(self, args, state, control, **kwargs):
        _reports.put((self.name, state.global_step, state.max_steps))


def warm_up(name: str, seed: int, dataset: str, levels: list[int]) -> str:
    """The folder of the built-in policy."""

    def tell(step: int, accuracy: Any) -> None:
        _reports.put((name, step, LEARNING_STEPS[dataset]))

    return str(mixed_policy(seed, tell) if dataset == "mixture" else small_policy(seed, tuple(levels), tell))


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


def train(name: str, settings: Settings, file: str) -> None:
    """Trains once, and writes the settings and the tidy rows to ``file``, whole or not at all."""
    dataset, levels, seed = settings["dataset"], tuple(settings["levels"]), settings["training"]["seed"]
    policy = settings["model"] or warm_up(name, seed, dataset, settings["levels"])
    make, more, reward = arithmetic_questions, {"levels": levels}, Correctness
    if dataset == "mixture":
        make, more, reward = mixture_questions, {}, SameText
    train_set = make(settings["train_size"], held_out=False, seed=seed, **more)
    held_out = make(settings["eval_size"], held_out=True, seed=seed, **more)
    datasets = [build_dataset(questions, "chat") for questions in (train_set, held_out)]
    judge: Any = reward()
    if noise := settings.get("reward_noise"):
        judge = Flipped(judge, noise, seed)
        datasets = [
            dataset.add_column("noisy", [noisy] * len(dataset))
            for dataset, noisy in zip(datasets, (True, False), strict=True)
        ]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CurvatureGRPOTrainer(
            model=policy,
            reward_funcs=[judge],
            args=training_config(settings, scratch),
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Tell(name))
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


@dataclass
class Task:
    """A call in a worker. ``needs``: the seed whose policy it starts from; ``gives``: the seed that it warms up."""

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    needs: int | None = None
    gives: int | None = None


class Workers:
    """Worker processes, and how far they are: a progress bar in a terminal, else a line now and then."""

    def __init__(self, jobs: int, total: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.reports = context.SimpleQueue()
        self.pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(self.reports,))
        self.jobs, self.total, self.done, self.trained = jobs, total, 0, 0
        self.failed: list[str] = []
        self.warm: set[int | None] = {None}
        self.started = time.monotonic()
        self.progress = AblationProgress(total)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            self.progress.tell(*self.reports.get())

    def stop(self) -> None:
        """Ends the workers in the middle of what they do."""
        self.progress.close()
        for worker in multiprocessing.active_children():
            worker.terminate()

    def close(self) -> None:
        """When all is done."""
        self.pool.shutdown()
        self.progress.close()

    def _each(self, tasks: list[Task], report: Callable[[str], None]) -> None:
        """Does everything in the workers, each task as soon as its policy is warm; ``report(name)`` as each ends, a
        failure is named and kept."""
        waiting, running = list(tasks), {}
        while waiting or running:
            ready = [task for task in waiting if task.needs in self.warm]
            # a run that can't begin waits for a policy: those are warmed up in the order in which they are needed
            for task in sorted(ready, key=lambda task: task.gives is not None)[: self.jobs - len(running)]:
                waiting.remove(task)
                self.progress.begin(task.name)
                running[self.pool.submit(task.call, task.name, *task.arguments)] = task
            if not running:
                break  # what is left needs a policy that failed, which is said
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                self.progress.end(task.name)
                try:
                    future.result()
                except BrokenExecutor:
                    self.progress.close()
                    raise RuntimeError(
                        "a worker process was killed (out of memory?); repeat the command to go on"
                    ) from None
                except Exception as error:
                    self.failed.append(task.name)
                    self.progress.say(f"FAILED {task.name}: {type(error).__name__}: {error}")
                else:
                    self.warm.add(task.gives)
                    report(task.name)

    def run(self, output_dir: str, wanted: Sequence[Settings], warm_ups: Iterable[int] = ()) -> list[Run]:
        """The ``Run`` of each of the settings, trained where it isn't there yet; without those that failed.

        ``warm_ups``: seeds whose policies are made on the way, where a worker has nothing else to do.
        """
        by_name, tasks = {}, []
        for settings in wanted:
            training = settings["training"]
            name = f"{settings['method']} at {training['learning_rate']:g}, seed {training['seed']}"
            by_name[name] = settings
            if read_run(output_dir, settings) is None:
                needs = training["seed"] if settings["model"] is None else None
                tasks.append(Task(name, train, (settings, str(run_file(output_dir, settings))), needs))
            else:
                self.done += 1
        if len(tasks) < len(wanted):
            self.progress.say(f"{len(wanted) - len(tasks)} of {len(wanted)} runs were done before")
            self.progress.runs(self.done)
        seeds = dict.fromkeys([*(task.needs for task in tasks), *warm_ups])
        cold = [seed for seed in seeds if seed not in self.warm]
        if cold:
            dataset, levels = wanted[0]["dataset"], wanted[0]["levels"]
            self.progress.say(
                f"The built-in policies of {len(cold)} seeds are warmed up where they aren't cached, "
                f"{LEARNING_STEPS[dataset]} steps each (measured: a minute and a half on one core), {self.jobs} at a "
                "time; a run begins as soon as its policy is there"
            )
            tasks += [Task(f"policy of seed {seed}", warm_up, (seed, dataset, levels), gives=seed) for seed in cold]

        def report(name: str) -> None:
            if name not in by_name:
                self.progress.say(f"  {name} is there")
                return
            self.done += 1
            self.trained += 1
            run = read_run(output_dir, by_name[name])
            assert run is not None
            accuracies = run.curve("held_out_accuracy")[1]
            left = (time.monotonic() - self.started) / self.trained * (self.total - self.done)
            self.progress.runs(self.done)
            self.progress.say(
                f"[{self.done}/{self.total}] {name}: held-out accuracy {accuracies[0]:.3f} -> {accuracies[-1]:.3f}, "
                f"about {left / 60:.0f} min left"
            )

        self._each(tasks, report)
        return [run for settings in wanted if (run := read_run(output_dir, settings))]
