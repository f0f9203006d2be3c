"""Reads a run's folder: TRL's log history, the interference files, the configuration; or a file with a log.

The run may be finished, still going, or killed. The log is ``log_history.jsonl``, else (runs of other trainers) the
``trainer_state.json`` of the folder or of a checkpoint, or a log that ``foreign`` reads, whichever goes furthest. What
can't be read, or belongs to an earlier run in the same folder, is skipped and named.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_kernels.recorder.files import FOLDER, InterferenceRecord, read_interference

from .foreign import ForeignLog, find_logs, read_file
from .foreign.tensorboard import run_name
from .run_files import CONFIG_FILE, LOG_FILE, RESUMED, Configuration, started_at

STATE_FILE = "trainer_state.json"
LogLine = dict[str, Any]  # an entry of TRL's log: metric -> value, with its step
CLOCKS_DIFFER = 60  # seconds that a file system's clock may be behind


_REAL = int | float


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, _REAL) and math.isfinite(value)
    except OverflowError:
        return False


def _kind(entry: LogLine) -> str:
    """Of what an entry is: "eval_", "train", or "" for neither."""
    if any(key.startswith("eval_") for key in entry):
        return "eval_"
    return "train" if trains(entry) else ""


def trains(entry: LogLine) -> bool:
    """Whether it is the entry of a training step, and not of an evaluation or of the whole run."""
    return "loss" in entry or "reward" in entry


@dataclass(frozen=True)
class Curve:
    """A metric over steps; None where it might have been logged and wasn't."""

    steps: list[int]
    values: list[float | None]

    @property
    def points(self) -> list[tuple[int, float | None]]:
        return list(zip(self.steps, self.values, strict=True))


@dataclass(frozen=True)
class Run:
    """``logs``: TRL's entries in order of step; ``problems``: what was skipped, one sentence each. ``folder``: or the
    file; ``source``: what another library's log was made of."""

    folder: Path
    name: str
    logs: list[LogLine]
    records: list[InterferenceRecord]
    config: Configuration
    problems: list[str] = field(default_factory=list)
    source: str = ""

    @functools.cached_property
    def _curves(self) -> dict[str, Curve]:
        return {}

    @functools.cached_property
    def _kinds(self) -> list[str]:
        return [_kind(entry) for entry in self.logs]

    @property
    def last_step(self) -> int:
        steps = [int(entry["step"]) for entry in self.logs] + [record.step for record in self.records]
        return max(steps, default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, where it is a finite number."""
        points = [(step, value) for step, value in self.curve(name).points if value is not None]
        return [step for step, _ in points], [value for _, value in points]

    def curve(self, name: str) -> Curve:
        """The curve of a metric; without a point where it is never logged.

        What interference files hold is of the step that was measured; TRL's log has it at the next step that it logs.
        Several values of one step (a second evaluation) are their mean.
        """
        if name not in self._curves:
            self._curves[name] = self._curve(name)
        return self._curves[name]

    def _curve(self, name: str) -> Curve:
        if not any(name in entry for entry in self.logs) and not any(name in one.metrics for one in self.records):
            return Curve([], [])
        measured = [(record.step, record.metrics.get(name)) for record in self.records]
        wanted = "eval_" if name.startswith("eval_") else "train"  # entries in which such a metric may be
        entries = zip(self.logs, self._kinds, strict=True)
        logged = [(entry["step"], entry.get(name)) for entry, kind in entries if kind == wanted or name in entry]
        of_files, of_log = (sum(is_number(value) for _, value in points) for points in (measured, logged))
        if not of_files and not of_log:
            return Curve([], [])
        if of_files and of_files >= of_log and name != "curvature/sigma_mean":  # which is logged of every batch
            points = measured
        else:
            # of a metric that few entries have, the others aren't gaps
            points = logged if 2 * of_log >= len(logged) else [(s, value) for s, value in logged if is_number(value)]
        by_step: dict[int, list[float]] = {}
        for step, value in points:
            by_step.setdefault(step, []).extend([float(value)] if value is not None and is_number(value) else [])
        means = [sum(values) / len(values) if values else None for values in by_step.values()]
        return Curve(list(by_step), means)

    @property
    def evaluated_questions(self) -> float:
        """How many rows were evaluated; 0 where the log doesn't say."""
        return (self.last("eval_runtime") or 0.0) * (self.last("eval_samples_per_second") or 0.0)

    def evaluated_again(self) -> dict[int, list[float]]:
        """Step -> accuracies, of steps that were evaluated more than once."""
        found: dict[int, list[float]] = {}
        for entry in self.logs:
            if is_number(entry.get("eval_accuracy")):
                found.setdefault(entry["step"], []).append(float(entry["eval_accuracy"]))
        return {step: values for step, values in found.items() if len(values) > 1}

    def last(self, name: str) -> float | None:
        """The latest value of a metric."""
        values = self.series(name)[1]
        return values[-1] if values else None


def read_run(folder: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> Run:
    """Everything that can be read of a run. ``names``: what metrics of another library are called here.

    Raises ``ValueError`` where it isn't a run's: no such folder or file, or neither a log nor interference in it.
    """
    path = Path(folder)
    if not path.is_dir():
        if not path.exists() and "#" not in path.name:
            raise ValueError(f"{os.fspath(folder)!r} is not the folder of a run: no such folder or file")
        log = read_file(path, names)
        # of an event file the folder is the run
        name = run_name(log.path) if log.path != path and log.path.is_dir() else path.stem
        return Run(path, name, log.lines, [], log.config, log.problems, log.described())
    problems: list[str] = []
    logs = _in_order(_lines(path / LOG_FILE, problems)) if (path / LOG_FILE).is_file() else []
    source, logged, reasons = "", Configuration(), list[str]()
    if not logs:
        logs, source, logged, reasons = _other_logs(path, names, problems)
    records = _records(path, problems) if (path / FOLDER).is_dir() else []
    if not logs and not records:
        looked = f"neither {STATE_FILE}, nor {LOG_FILE}, nor {FOLDER}/, nor another library's log with anything to read"
        skipped = f" ({'; '.join(problems + reasons)})" if problems or reasons else ""
        raise ValueError(f"{os.fspath(folder)!r} is not the folder of a run: {looked}{skipped}")
    if not logs:  # the metrics of the logged steps are in their files too
        logs = [{"step": record.step, **record.metrics} for record in records]
    config = _json(path / CONFIG_FILE, problems) if (path / CONFIG_FILE).is_file() else {}
    config = config if isinstance(config, dict) and config else logged
    return Run(path, run_name(path) or str(path), logs, records, config, problems, source)


def _other_logs(
    path: Path, names: Mapping[str, str] | None, problems: list[str]
) -> tuple[list[LogLine], str, Configuration, list[str]]:
    """(the log that goes furthest, what it was made of, its configuration, why other files are no logs); TRL's states
    come first."""
    state = max(_states(path, problems), key=_reach, default=[])
    found, reasons = find_logs(path, names)
    best: ForeignLog | None = max(found, key=lambda log: _reach(log.lines)[0], default=None)
    if best is None or (state and _reach(state)[0] >= _reach(best.lines)[0]):
        return state, "", {}, reasons
    behind = [(other.path, other.lines) for other in found if other is not best]
    behind += [(path / STATE_FILE, state)] if state else []
    problems += [f"{file}: it goes to step {_reach(lines)[0]}, {best.path} as far or further" for file, lines in behind]
    problems += best.problems
    return best.lines, best.described(), best.config, reasons


def _records(path: Path, problems: list[str]) -> list[InterferenceRecord]:
    """The run's interference files, without those that are older than the run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = read_interference(path)
    problems += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    border = (started_at(path) or 0.0) - CLOCKS_DIFFER
    kept = [r for r in records if (path / FOLDER / f"step_{r.step:08d}.npz").stat().st_mtime >= border]
    if len(kept) < len(records):
        older = len(records) - len(kept)
        problems.append(f"{path / FOLDER}: {older} files are skipped, they are older than the run")
    return kept


def _reach(logs: list[LogLine]) -> tuple[float, int]:
    return max((entry["step"] for entry in logs), default=-1), len(logs)


def _states(path: Path, problems: list[str]) -> list[list[LogLine]]:
    """The logs of TRL's state files: the folder's and each checkpoint's."""
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
    files = [folder / STATE_FILE for folder in (path, *checkpoints)]
    states = [_json(file, problems) for file in files if file.is_file()]
    histories = [state.get("log_history") for state in states if isinstance(state, dict)]
    return [_in_order(history) for history in histories if isinstance(history, list)]


def _json(file: Path, problems: list[str]) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file} is skipped, it can't be read: {error}")
        return None


def _lines(file: Path, problems: list[str]) -> list[Any]:
    entries, broken = [], 0
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    for line in lines:
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            broken += 1
    if broken:
        problems.append(f"{file}: {broken} of {len(lines)} lines are skipped, they can't be read")
    return entries


def _in_order(entries: list[Any]) -> list[LogLine]:
    """Drops earlier entries of steps that are done again, after a resume or where steps go back."""
    kept: list[LogLine] = []
    for entry in entries:
        if not isinstance(entry, dict) or not is_number(entry.get("step")):
            continue
        if entry.get(RESUMED):
            kept = [earlier for earlier in kept if earlier["step"] <= entry["step"]]
            continue
        if kept and kept[-1]["step"] > entry["step"]:
            kept = [earlier for earlier in kept if earlier["step"] < entry["step"]]
        kept.append(entry)
    return kept
