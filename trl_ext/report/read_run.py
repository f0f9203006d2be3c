"""Reads a run's folder: TRL's log history, the interference files, the configuration.

The run may be finished, still going, or killed. The log is ``log_history.jsonl``, else (runs of TRL's own trainer) the
``trainer_state.json`` of the folder or of a checkpoint, whichever goes furthest. What can't be read, or belongs to an
earlier run in the same folder, is skipped and named.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.recorder.files import FOLDER, InterferenceRecord, read_interference

from .run_files import CONFIG_FILE, LOG_FILE, RESUMED, started_at

STATE_FILE = "trainer_state.json"
CLOCKS_DIFFER = 60  # seconds that a file system's clock may be behind


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(float(value))
    except OverflowError:
        return False


def _same_kind(entry: dict[str, Any], name: str) -> bool:
    """Whether such a metric may be in this entry: an evaluation's, or a training step's."""
    of_evaluation = any(key.startswith("eval_") for key in entry)
    return name in entry or (of_evaluation if name.startswith("eval_") else "loss" in entry and not of_evaluation)


@dataclass(frozen=True)
class Run:
    """``logs``: TRL's entries in order of step; ``problems``: what was skipped, one sentence each."""

    folder: Path
    name: str
    logs: list[dict[str, Any]]
    records: list[InterferenceRecord]
    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        steps = [int(entry["step"]) for entry in self.logs] + [record.step for record in self.records]
        return max(steps, default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, where it is a finite number."""
        points = [(step, value) for step, value in zip(*self.curve(name), strict=True) if value is not None]
        return [step for step, _ in points], [value for _, value in points]

    def curve(self, name: str) -> tuple[list[int], list[float | None]]:
        """(steps, values) of a metric, None where it might have been and isn't; none at all where it never is.

        What interference files hold is of the step that was measured; TRL's log has it at the next step that it logs.
        Several values of one step (a second evaluation) are their mean.
        """
        measured = [(record.step, record.metrics.get(name)) for record in self.records]
        logged = [(entry["step"], entry.get(name)) for entry in self.logs if _same_kind(entry, name)]
        of_files, of_log = (sum(_is_number(value) for _, value in points) for points in (measured, logged))
        if not of_files and not of_log:
            return [], []
        if of_files and of_files >= of_log and name != "curvature/sigma_mean":  # which is logged of every batch
            points = measured
        else:
            # of a metric that few entries have, the others aren't gaps
            points = logged if 2 * of_log >= len(logged) else [(s, value) for s, value in logged if _is_number(value)]
        by_step: dict[int, list[float]] = {}
        for step, value in points:
            by_step.setdefault(step, []).extend([float(value)] if value is not None and _is_number(value) else [])
        return list(by_step), [sum(values) / len(values) if values else None for values in by_step.values()]

    def evaluated_again(self, name: str = "eval_accuracy") -> dict[int, list[float]]:
        """Steps that were evaluated more than once, and what came out."""
        found: dict[int, list[float]] = {}
        for entry in self.logs:
            if _is_number(entry.get(name)):
                found.setdefault(entry["step"], []).append(float(entry[name]))
        return {step: values for step, values in found.items() if len(values) > 1}

    def last(self, name: str) -> float | None:
        """The latest value of a metric."""
        values = self.series(name)[1]
        return values[-1] if values else None


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Everything that can be read of a run.

    Raises ``ValueError`` where the folder isn't a run's: no such folder, or neither a log nor interference in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{os.fspath(folder)!r} is not the folder of a run: no such folder")
    problems: list[str] = []
    logs = _in_order(_lines(path / LOG_FILE, problems)) if (path / LOG_FILE).is_file() else []
    logs = logs or max(_states(path, problems), key=_reach, default=[])
    records = []
    if (path / FOLDER).is_dir():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            records = read_interference(path)
        problems += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    started = started_at(path)
    if started is not None:
        earlier = [record for record in records if _written(path, record) < started - CLOCKS_DIFFER]
        if earlier:
            problems.append(f"{path / FOLDER}: {len(earlier)} files are skipped, they are older than the run")
            old = {record.step for record in earlier}
            records = [record for record in records if record.step not in old]
    if not logs and not records:
        looked = f"neither {STATE_FILE}, nor {LOG_FILE}, nor {FOLDER}/ with anything to read"
        skipped = f" ({'; '.join(problems)})" if problems else ""
        raise ValueError(f"{os.fspath(folder)!r} is not the folder of a run: {looked}{skipped}")
    if not logs:  # the metrics of the logged steps are in their files too
        logs = [{"step": record.step, **record.metrics} for record in records]
    config = _json(path / CONFIG_FILE, problems) if (path / CONFIG_FILE).is_file() else {}
    config = config if isinstance(config, dict) else {}
    return Run(path, path.resolve().name or str(path), logs, records, config, problems)


def _reach(logs: list[dict[str, Any]]) -> tuple[float, int]:
    return max((entry["step"] for entry in logs), default=-1), len(logs)


def _written(path: Path, record: InterferenceRecord) -> float:
    return (path / FOLDER / f"step_{record.step:08d}.npz").stat().st_mtime


def _states(path: Path, problems: list[str]) -> list[list[dict[str, Any]]]:
    found = []
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
    for file in [path / STATE_FILE, *(checkpoint / STATE_FILE for checkpoint in checkpoints)]:
        if file.is_file():
            state = _json(file, problems)
            history = state.get("log_history") if isinstance(state, dict) else None
            if isinstance(history, list):
                found.append(_in_order(history))
    return found


def _json(file: Path, problems: list[str]) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file} is skipped, it can't be read: {error}")
        return None


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    entries, broken = [], 0
    try:
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        problems.append(f"{file} is skipped, it can't be read: {error}")
        return []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            broken += 1
    if broken:
        problems.append(f"{file}: {broken} of {len(lines)} lines are skipped, they can't be read")
    return entries


def _in_order(entries: list[Any]) -> list[dict[str, Any]]:
    """Drops earlier entries of steps that are done again, after a resume or where steps go back."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            continue
        if entry.get(RESUMED):
            kept = [earlier for earlier in kept if earlier["step"] <= entry["step"]]
        elif kept and kept[-1]["step"] > entry["step"]:
            kept = [*(earlier for earlier in kept if earlier["step"] < entry["step"]), entry]
        else:
            kept.append(entry)
    return kept
