"""From a file, or the files of a folder, to a log with our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration import trl_options
from ..run_files import Configuration
from . import tensorboard, text, trackio, wandb
from .names import out_of_range, translate
from .rows import Log, curves, logged_again, step_name

FORMATS = (
    "TRL's trainer_state.json, TensorBoard's event files, W&B's history (JSON, CSV, run-ID.wandb), trackio's database, "
    "JSONL of verl, prime-rl or any with a step, CSV with a step"
)
# what may be a log in a folder, and not data or answers; prime-rl's trainer and orchestrator share one metrics.jsonl
PLACES = ("*.jsonl", "*.csv", "*.db", "*.wandb", "wandb/*/*.wandb", "*history*.json")
MOST_UNUSED = 12  # names that are listed
EVENTS = ("", "*/", "*/*/")  # folders that may have event files: transformers' is runs/TIME_HOST


@dataclass(frozen=True)
class ForeignLog:
    """A log with our names.

    ``used``: ours -> theirs; ``unused``: names without a use here; ``config``: a TRL run's options that may be shown.
    """

    kind: str
    path: Path
    lines: list[dict[str, Any]]
    used: dict[str, str]
    unused: list[str]
    problems: list[str]
    config: Configuration

    def described(self) -> str:
        """What was read, which names became which of ours, and which have no use."""
        prefixed = {ours: (f"train/{ours}", re.sub("^eval_", "eval/", ours)) for ours in self.used}
        renamed = [f"{ours} is {name}" for ours, name in self.used.items() if name not in (ours, *prefixed[ours])]
        more = f" and {len(self.unused) - MOST_UNUSED} more" if len(self.unused) > MOST_UNUSED else ""
        return "; ".join(
            [
                f"read from {self.kind} ({self.path.name}), {len(self.used)} metrics"
                + (f" and {len(self.config)} options" if self.config else ""),
                *([", ".join(renamed)] if renamed else []),
                *([f"without a use here: {', '.join(self.unused[:MOST_UNUSED])}{more}"] if self.unused else []),
            ]
        )


def _read(path: Path) -> Log:
    file, _, run = str(path).partition("#")
    if not path.is_file() and run:  # project.db#run
        return trackio.read(Path(file), run)
    with open(path, "rb") as opened:
        start = opened.read(16)
    if start == trackio.MAGIC:
        return trackio.read(path)
    if start[:4] == wandb.MAGIC:
        return wandb.read(path)
    if tensorboard.is_event_file(start[:12]):
        return tensorboard.read([path])
    return text.read(path)


def read_file(path: Path, names: Mapping[str, str] | None = None) -> ForeignLog:
    """A file as a log with our names. ``names``: a user's own table.

    Raises ``ValueError`` that says what was looked for, where the file is no log or no metric of it is known.
    """
    try:
        return _translated(_read(path), names or {})
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} isn't a log that can be read: {error}. Looked for: {FORMATS}") from None


def _translated(log: Log, names: Mapping[str, str]) -> ForeignLog:
    chosen = [theirs for theirs, ours in names.items() if ours == "step" and any(theirs in row for row in log.rows)]
    step = log.step or next(iter(chosen), None) or step_name(log.rows)
    if step is None:
        found = ", ".join(list(dict.fromkeys(name for row in log.rows[:100] for name in row))[:MOST_UNUSED])
        raise ValueError(f"no step in most of its {len(log.rows)} rows, which have {found or 'nothing'}")
    theirs = curves(log.rows, step)
    used, unused, problems = translate(theirs, names)
    for ours, name in list(used.items()):
        if why := out_of_range(ours, theirs[name]):
            problems.append(f"{name} isn't taken as {ours}: {why}")
            del used[ours]
    if not theirs:
        found = ", ".join(list(dict.fromkeys(name for row in log.rows for name in row if name != step))[:MOST_UNUSED])
        raise ValueError(f"it has no numbers under its names {found}" if found else "it has no metrics")
    if not used:
        raise ValueError(f"none of its names is known: {', '.join(unused[:MOST_UNUSED])}; --names FILE gives more")
    if again := logged_again(log.rows, step, set(used.values())):
        problems.append(
            f"{log.path}: {again} values are left out, as later ones are of the same steps: the run went on from an "
            "earlier step, or the log has several runs"
        )
    lines = _lines({ours: theirs[name] for ours, name in used.items()})
    return ForeignLog(log.kind, log.path, lines, used, unused, problems, trl_options(log.config))


def _lines(series: Mapping[str, Mapping[float, float]]) -> list[dict[str, Any]]:
    """A line for each step and, as TRL has it, one of its own for what was evaluated there."""
    found: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, values in series.items():
        for step, value in values.items():
            found.setdefault((step, name.startswith("eval_")), {})[name] = value
    return [{**line, "step": int(step)} for (step, _), line in sorted(found.items())]


def find_logs(folder: Path, names: Mapping[str, str] | None = None) -> tuple[list[ForeignLog], list[str]]:
    """(the logs in a folder, why its other candidates aren't any). Event files of one folder are one log."""
    candidates = {path: [path] for pattern in PLACES for path in sorted(folder.glob(pattern)) if path.is_file()}
    for place in EVENTS:
        for path in folder.glob(place + tensorboard.FILES):
            candidates.setdefault(path.parent, []).append(path)
    logs, reasons = [], []
    for path, files in candidates.items():
        try:
            log = tensorboard.read(files) if path.is_dir() else _read(path)
            logs.append(_translated(log, names or {}))
        except (OSError, ValueError) as error:
            reasons.append(f"{path}: {error}")
    return logs, reasons
