"""The JSON file of one part: its rows, which cases are done, and what was running when a process ended.

A part is a function that goes through cases; a case has contenders that take turns. The file is written after each of
them, so that a process that crashes or is killed loses no more than the case it was in, and the contender that crashed
isn't tried again.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

FLOOR = "floor"
POISONED = 3  # exit code: after an error of CUDA nothing in this process runs any more
CUDA_ERRORS = ("CUDA error", "CUDA driver error", "device-side assert", "illegal memory access", "unspecified launch")


@dataclass(frozen=True)
class Row:
    """What was measured of one contender in one case; ``note`` says why nothing was, or what sets it apart."""

    case: str
    contender: str
    values: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def place(self) -> tuple[str, str]:
        return self.case, self.contender


@dataclass
class PartFile:
    """What one part has found so far. ``key``: of the code, the versions and the device that it was measured with."""

    path: Path
    name: str
    key: str
    state: str = "new"  # "running", "done", "time is up" or "failed"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    done: list[str] = field(default_factory=list)  # cases; of some parts contenders, whose rows are kept too
    crashed: list[Row] = field(default_factory=list)
    running: tuple[str, str] | None = None
    error: str = ""

    @classmethod
    def load(cls, path: Path, name: str, key: str) -> PartFile:
        """The file's content where it is of the same key, else an empty one. Rows of unfinished cases are dropped."""
        found = read(path)
        if found is None or found.key != key:
            return cls(path, name, key)
        if found.state != "done":
            found.rows = [row for row in found.rows if row.case in found.done or row.contender in found.done]
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({**asdict(self), "path": ""}, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def mark_crashed(self, note: str) -> None:
        """Called after the process has ended: what was running isn't run again."""
        if self.running is not None:
            self.crashed.append(Row(*self.running, note=note))
        self.running = None
        self.save()

    @property
    def all_rows(self) -> list[Row]:
        shown = {row.place for row in self.rows}
        return self.rows + [row for row in self.crashed if row.place not in shown]


def read(path: Path) -> PartFile | None:
    """A part's file; None if it isn't there, or isn't one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: [Row(**row) for row in found.pop(name)] for name in ("rows", "crashed")}
        running = found.pop("running")
        return PartFile(**{**found, **rows, "path": path, "running": tuple(running) if running else None})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def reason(error: BaseException) -> str:
    """One short line: the error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class Record:
    """What a part's function writes to.

    Args:
        minutes: of the part; ``left`` counts them down.
    """

    def __init__(self, file: PartFile, minutes: float) -> None:
        self.file, self.started, self.before = file, time.monotonic(), file.seconds
        self.parent = os.getppid()
        self.deadline = self.started + 60 * minutes

    def left(self) -> float:
        """Seconds until the part is killed."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        if os.getppid() != self.parent:
            os._exit(1)  # the runner was killed; its successor may write this file
        self.file.seconds = self.before + time.monotonic() - self.started
        self.file.save()

    def open_cases(self, cases: Iterable[str]) -> Iterator[str]:
        """Yields the cases that aren't done, and marks each as done when the caller takes the next one."""
        for case in cases:
            if case in self.file.done:
                continue
            yield case
            self.file.done.append(case)
            self.save()

    def add(self, case: str, contender: str, values: dict[str, float] | None = None, note: str = "") -> None:
        self.file.rows.append(Row(case, contender, values or {}, note))
        self.save()

    def untried(self, case: str, contenders: Iterable[str]) -> list[str]:
        """Those that haven't crashed in this case."""
        crashed = {row.place for row in self.file.crashed}
        return [name for name in contenders if (case, name) not in crashed]

    @contextmanager
    def attempt(self, case: str, contender: str) -> Iterator[None]:
        """Records an exception as the contender's row, and goes on after it."""
        self.file.running = (case, contender)
        self.save()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            if any(text in str(error) for text in CUDA_ERRORS):
                self.file.mark_crashed(reason(error))
                sys.exit(POISONED)
            self.add(case, contender, note=reason(error))
        self.file.running = None
