"""Starts runs as processes, several at a time, and reads what came of each."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

from .study import Mode, Result, Run, Spec, write_whole

MODULE = "trl_ext.ablate.run_script"
TAIL = 2000  # characters of a failed run's output in its error


class Launcher:
    """Runs the user's script.

    Args:
        script, arguments: as in ``Spec``.
        launcher: the command that starts Python programs, as ``accelerate launch --num_processes 2``; "": Python.
        jobs: runs at the same time.
        one_thread: whether each run has one CPU thread.
    """

    def __init__(self, script: str, arguments: Sequence[str], launcher: str, jobs: int, one_thread: bool) -> None:
        self.script, self.arguments, self.launcher, self.jobs = script, list(arguments), launcher, jobs
        self._one_thread = one_thread
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def command(self, run: Run) -> list[str]:
        """Returns the command of a run, which can be started anywhere that has this folder."""
        start = [sys.executable] if not self.launcher else shlex.split(self.launcher)
        return [*start, "-m", MODULE, str(run.folder / "spec.json")]

    def prepare(self, run: Run, mode: Mode) -> None:
        """Writes the run's ``spec.json``."""
        spec = Spec(self.script, self.arguments, run.options, mode, str(run.folder / "result.json"))
        spec.write(run.folder / "spec.json")

    def start(self, run: Run, mode: Mode, device: int | None = None) -> Result:
        """Runs one, and returns its result, also of one that failed or was killed."""
        self.prepare(run, mode)
        (run.folder / "result.json").unlink(missing_ok=True)
        with open(run.folder / "output.txt", "wb") as output:
            code = self._wait(run, output, device)
        if self._stopped:
            raise KeyboardInterrupt
        found = run.result()
        if found is None:
            text = (run.folder / "output.txt").read_text(errors="replace")
            found = Result("failed", f"its process ended with {code} and left no result: {text[-TAIL:]}")
            self._keep(run, found)
        elif code and found.status != "failed":
            found.status, found.error = "failed", f"its process ended with {code}"
            self._keep(run, found)
        return found

    def _keep(self, run: Run, result: Result) -> None:
        import json
        from dataclasses import asdict

        write_whole(run.folder / "result.json", json.dumps(asdict(result)))

    def _wait(self, run: Run, output: IO[bytes], device: int | None) -> int:
        environment = dict(os.environ)
        if self._one_thread:
            environment["OMP_NUM_THREADS"] = "1"
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with self._lock:
            process = subprocess.Popen(
                self.command(run), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Ends all processes that run, with their children."""
        self._stopped = True
        with self._lock:
            for process in self._running:
                os.killpg(process.pid, signal.SIGTERM)

    def train(self, runs: Sequence[Run], report: Callable[[Run, Result], None]) -> None:
        """Trains those that have no result yet, and reports each as it ends.

        With several jobs on a machine with GPUs, each run has one of them to itself.
        """
        left = [run for run in runs if run.result() is None]
        devices = self._devices()
        with ThreadPoolExecutor(self.jobs) as pool:
            free = list(range(self.jobs))

            def one(run: Run) -> Result:
                with self._lock:
                    place = free.pop()
                try:
                    return self.start(run, "train", None if not devices else devices[place % len(devices)])
                finally:
                    free.append(place)

            futures = {pool.submit(one, run): run for run in left}
            try:
                for future in as_completed(futures):
                    report(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def _devices(self) -> list[int]:
        """Returns the GPUs among which runs are shared out; none for one job or a launcher, which sees all of them."""
        if self.jobs == 1 or self.launcher:
            return []
        import torch

        return list(range(torch.cuda.device_count()))


class Progress:
    """Prints a line for each run that ends."""

    def __init__(self, total: int, jobs: int, metric: str) -> None:
        self.total, self.jobs, self.metric = total, jobs, metric
        self.done, self.trained, self.started = 0, 0, time.monotonic()

    def report(self, run: Run, result: Result) -> None:
        """Prints what came of the run, and how long the others will take."""
        from .study import read_curve

        self.done += 1
        self.trained += 1
        left = (time.monotonic() - self.started) / self.trained * (self.total - self.done)
        if result.status == "failed":
            text = f"FAILED: {result.error.strip().splitlines()[-1] if result.error.strip() else ''}"
        else:
            values = read_curve(result.logs, self.metric).values
            text = f"{self.metric} {values[0]:.3f} -> {values[-1]:.3f}" if values else f"no {self.metric} in its log"
        print(f"[{self.done}/{self.total}] {run.name}: {text}, about {left / 60:.0f} min left", flush=True)


def write_commands(file: Path, launcher: Launcher, runs: Sequence[Run]) -> None:
    """Writes the commands of these runs, one a line, to be started anywhere that shares the folder."""
    for run in runs:
        launcher.prepare(run, "train")
    write_whole(file, "".join(shlex.join(launcher.command(run)) + "\n" for run in runs))


def submit(launcher: Launcher, runs: Sequence[Run], folder: Path, parameters: dict[str, str]) -> None:
    """Submits runs through ``submitit``, to SLURM where there is one, and waits for them.

    Args:
        parameters: submitit's, as ``slurm_partition``; ``cluster=local`` runs them here.
    """
    import submitit

    cluster = parameters.pop("cluster", None)
    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    executor.update_parameters(**{name: int(value) if value.isdigit() else value for name, value in parameters.items()})
    jobs = []
    with executor.batch():
        for run in runs:
            launcher.prepare(run, "train")
            jobs.append(executor.submit(submitit.helpers.CommandFunction(launcher.command(run))))
    for job in jobs:
        job.exception()  # waits; a failed run's result says why
