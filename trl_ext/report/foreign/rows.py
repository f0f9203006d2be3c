"""What every reader returns: a log as rows of names and values; and the curves that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # a call of the writer's: name -> value, with the step under one of STEPS
Series = dict[float, float]  # step -> value

# transformers' callbacks for W&B and trackio log the trainer's step as a metric (5.23, integration_utils.py:900 and
# 1096); `_step` counts calls of log, and TRL logs rows of its profile without a step in between
TRAINERS_STEP = "train/global_step"
STEPS = (TRAINERS_STEP, "step", "Step", "global_step", "_step")
WORDS = {"nan": "nan", "infinity": "inf", "-infinity": "-inf"}  # how W&B and trackio write what JSON doesn't have


@dataclass(frozen=True)
class Log:
    """A log as its file has it.

    ``kind``: whose format it is, in words; ``step``: what the format calls a row's step, "" where that is free;
    ``config``: all that the file has of the run's configuration.
    """

    kind: str
    path: Path
    rows: list[Row]
    step: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def number(value: Any) -> float | None:
    """A value as a number, also of a text (CSV, and what JSON doesn't have); None where it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def step_name(rows: Sequence[Row]) -> str | None:
    """The name under which rows have their step: the trainer's, or what half of them have. None where there is none."""
    for name in STEPS:
        least = 1 if name == TRAINERS_STEP else max(1, len(rows) / 2)
        if sum(number(row.get(name)) is not None for row in rows) >= least:
            return name
    return None


def curves(rows: Sequence[Row], step: str) -> dict[str, Series]:
    """Name -> its values by step, in the order of the file. Where a name's step goes back the run went on from there:
    its later values are dropped, as the run does them again."""
    found: dict[str, Series] = {}
    last: dict[str, float] = {}
    for row in rows:
        at = number(row.get(step))
        if at is None or not math.isfinite(at):
            continue
        for name, value in row.items():
            figure = number(value)
            if name == step or figure is None:
                continue
            series = found.setdefault(name, {})
            if at < last.get(name, at):
                for later in [one for one in series if one >= at]:
                    del series[later]
            series[at] = figure
            last[name] = at
    return found


def logged_again(rows: Sequence[Row], step: str, names: Set[str]) -> int:
    """How many of these metrics' values are of a step that the log had reached before, with another value there."""
    found: dict[str, Series] = {}
    count = 0
    for row in rows:
        at = number(row.get(step))
        for name in names & row.keys():
            figure = number(row[name])
            if at is None or figure is None:
                continue
            earlier = found.setdefault(name, {})
            count += at in earlier and earlier[at] != figure and not math.isnan(figure)
            earlier[at] = figure
    return count
