"""Starts runs as processes, several at a time, and reads what came of each."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import IO

from .study import TOOL, Mode, Result, Run, Spec, read_curve, write_whole

MODULE = "trl_ext.ablate.run_script"
TAIL = 2000  # characters of a failed run's output in its error
GRACE = 20.0  # seconds in which a process may end by itself
SHARES_GPUS = ("accelerate", "torchrun", "deepspeed")  # launchers, each of which takes every GPU


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
        start = [sys.executable] if not self.launcher else shlex.split(self.launcher, posix=os.name != "nt")
        return [*start, "-m", MODULE, str(run.folder / "spec.json")]

    def prepare(self, run: Run, mode: Mode) -> None:
        """Writes the run's ``spec.json``."""
        spec = Spec(self.script, self.arguments, run.options, mode, str(run.folder / "result.json"))
        spec.write(run.folder / "spec.json")

    def start(self, run: Run, mode: Mode, device: str | None = None) -> Result:
        """Runs one, and returns its result, also of one that failed or was killed."""
        self.prepare(run, mode)
        self.clean(run)
        with open(run.folder / "output.txt", "wb") as output:
            code = self._wait(run, output, device)
        if self._stopped:  # a script may have saved, and ended as if it had finished
            (run.folder / "result.json").unlink(missing_ok=True)
            raise KeyboardInterrupt
        found = run.result()
        if found is None:
            text = (run.folder / "output.txt").read_text(errors="replace")
            found = self.failed(run, f"its process ended with {code} and left no result: {text[-TAIL:]}")
        elif code and found.status != "failed":
            found.status, found.error = "failed", f"its process ended with {code}"
            self._keep(run, found)
        return found

    @staticmethod
    def clean(run: Run) -> None:
        """Removes what an earlier attempt left, so that its logs and checkpoints aren't read as this one's."""
        (run.folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(run.folder / "trainer", ignore_errors=True)

    def failed(self, run: Run, error: str) -> Result:
        """Writes the result of a run that left none."""
        found = Result("failed", error)
        self._keep(run, found)
        return found

    def _keep(self, run: Run, result: Result) -> None:
        write_whole(run.folder / "result.json", json.dumps(asdict(result)))

    def _wait(self, run: Run, output: IO[bytes], device: str | None) -> int:
        environment = {**os.environ, **self.variables, TOOL: str(os.getpid())}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with self._lock:
            if self._stopped:
                return 1
            process = subprocess.Popen(
                self.command(run), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that every run needs, also one that is started elsewhere.

        With one seed of Python's hashes, data that a script makes from sets are the same in every run.
        """
        hashes = {"PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0")}
        return {**hashes, "OMP_NUM_THREADS": "1"} if self._one_thread else hashes

    def stop(self) -> None:
        """Ends all processes that run, with their children: asks them, and kills those that don't end."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            end(process, kill=False)
        last = time.monotonic() + GRACE
        while any(process.poll() is None for process in running) and time.monotonic() < last:
            time.sleep(0.1)
        for process in running:
            end(process, kill=True)  # also children that outlived it

    def train(self, runs: Sequence[Run], report: Callable[[Run, Result], None]) -> None:
        """Trains those that have no result yet, and reports each as it ends.

        With several jobs on a machine with GPUs, each run has one of them to itself.
        """
        left = [run for run in runs if run.result() is None]
        devices = self._devices()
        with ThreadPoolExecutor(self.jobs) as pool:
            free = list(range(self.jobs))

            def one(run: Run) -> Result:
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

    def _devices(self) -> list[str]:
        """Returns the GPUs among which runs are shared out, of those that this process may use; none for one job or a
        launcher, which sees all of them."""
        if self.jobs == 1 or self.launcher:
            return []
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return [name for name in visible.split(",") if name][: torch.cuda.device_count()] or [
            str(i) for i in range(torch.cuda.device_count())
        ]


def end(process: subprocess.Popen[bytes], kill: bool) -> None:
    """Signals a process and its children. Windows has no groups of processes: there it ends the process alone."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        elif kill:
            process.kill()
        else:
            process.terminate()
    except OSError:  # it has ended
        pass


class Progress:
    """Prints a line for each run that ends."""

    def __init__(self, total: int, jobs: int, metric: str) -> None:
        self.total, self.jobs, self.metric = total, jobs, metric
        self.done, self.trained, self.started = 0, 0, time.monotonic()

    def report(self, run: Run, result: Result) -> None:
        """Prints what came of the run, and how long the others will take."""
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
    write_whole(file, "".join(shlex.join(command_anywhere(launcher, run)) + "\n" for run in runs))


def command_anywhere(launcher: Launcher, run: Run) -> list[str]:
    """Returns a run's command with its environment variables."""
    variables = [f"{name}={value}" for name, value in launcher.variables.items()]
    return [*(["env", *variables] if variables else []), *launcher.command(run)]


def submit(
    launcher: Launcher,
    runs: Sequence[Run],
    folder: Path,
    parameters: dict[str, str],
    report: Callable[[Run, Result], None],
) -> None:
    """Submits runs through ``submitit``, to SLURM where there is one, and waits for them.

    Args:
        parameters: submitit's, as ``slurm_partition``; ``cluster=local`` runs them here.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--submitit needs it: pip install submitit; --list writes the commands without it") from None
    cluster = parameters.pop("cluster", None)
    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    executor.update_parameters(**{name: int(value) if value.isdigit() else value for name, value in parameters.items()})
    jobs = []
    with executor.batch():
        for run in runs:
            launcher.prepare(run, "train")
            launcher.clean(run)
            jobs.append(executor.submit(submitit.helpers.CommandFunction(command_anywhere(launcher, run))))
    for run, job in zip(runs, jobs, strict=True):
        error = job.exception()  # waits
        found = run.result()
        report(run, launcher.failed(run, f"its job left no result: {error}") if found is None else found)
