"""Processes for tests, forked from one that has imported everything: a start takes a tenth of a second, not ten.

``start`` forks one or two that see each other as torchrun's do (gloo), ``finish`` waits for them; ``run_script`` is how
a script is run in one. Nothing is shared but the imports, so that a child may be killed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
QUIET = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "TRITON_INTERPRET": "0"}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["imported_once"])


@dataclass
class Started:
    """Processes that run, and the files that they write to, standard output and error together."""

    processes: list[Any]
    outputs: list[Path]

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def text(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.outputs if path.exists())

    def wait_for(self, there: Path, seconds: float = 120) -> None:
        """Until the file is there: one that a process writes before it waits itself, or it would be a race."""
        deadline = time.monotonic() + seconds
        while not there.exists():
            assert self.running(), self.text()[-3000:]
            assert time.monotonic() < deadline, f"{there} never came: {self.text()[-3000:]}"
            time.sleep(0.05)

    def finish(self, seconds: float = 300) -> list[int]:
        """Exit codes; negative: the signal that ended it."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, f"no end after {seconds} s: {self.text()[-3000:]}"
        return [process.exitcode for process in self.processes]


def _run_server() -> None:
    """Starts what is forked from. It finds modules by PYTHONPATH alone, and passes over those that it doesn't find."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _child(variables: dict[str, str], cwd: str, output: str, function: Callable[..., None], args: tuple) -> None:
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    # of the process that was forked from, and of the new descriptors
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children
    os.chdir(cwd)
    assert "imported_once" in sys.modules, "this process has imported everything anew"
    function(*args)


def start(
    count: int, function: Callable[..., None], *args: Any, folder: Path, cwd: Path | None = None, **variables: str
) -> Started:
    """``count`` processes that call ``function(*args)``, a function of a module; their output goes into ``folder``."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}
    base.update(variables)
    if count > 1:
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        base |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    folder.mkdir(parents=True, exist_ok=True)
    started = Started([], [])
    _run_server()
    for rank in range(count):
        own = {**base, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})}
        output = folder / f"output-{free_port()}-{rank}.txt"
        arguments = (own, str(cwd or Path.cwd()), str(output), function, args)
        process = CONTEXT.Process(target=_child, args=arguments)
        process.start()
        started.processes.append(process)
        started.outputs.append(output)
    return started


def run_script(script: Path, arguments: list[str], wait_at: int | None = None, folder: Path | None = None) -> None:
    """A script as ``python script.py``. ``wait_at``: its reward function says in ``folder`` that this many optimizer
    steps are done (a file ``here``), and goes on when there is a file ``go``."""
    if wait_at is not None and folder is not None:
        from examples.tasks.correctness import SameText

        judge = SameText.__call__

        def wait_and_judge(self, *args, trainer_state=None, **kwargs):
            if trainer_state is not None and trainer_state.global_step == wait_at and not (folder / "here").exists():
                (folder / "here").touch()
                while not (folder / "go").exists():
                    time.sleep(0.02)
            return judge(self, *args, **kwargs)

        SameText.__call__ = wait_and_judge  # type: ignore[method-assign]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))  # as Python does
    runpy.run_path(str(script), run_name="__main__")


def load_script(script: Path = ROOT / "examples" / "math.py") -> Any:
    """An example as a module; its own name is the standard library's."""
    name = f"{script.stem}_example"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def environment(**extra: str) -> dict[str, str]:
    """Variables of a script that is started as a user does."""
    return {**os.environ, **QUIET, **extra}
