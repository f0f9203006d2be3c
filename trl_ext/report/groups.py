"""Several runs side by side: seeds of one configuration belong together; what differs between configurations.

Runs can be compared where their logs have a curve in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .read_run import Run
from .run_files import STARTED

# what differs between two runs of one configuration
NOT_CONFIGURATION = (
    "seed",
    "data_seed",
    "output_dir",
    "run_name",
    "logging_dir",
    "hub_model_id",
    "resume_from_checkpoint",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "report_to",
    STARTED,
)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, which differ by seed and folder."""

    name: str
    runs: list[Run]


def _configuration(run: Run) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, repr(v)) for k, v in run.config.items() if k not in NOT_CONFIGURATION))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """In the order given. A run without a configuration is a group of its own.

    Raises ``ValueError`` where two runs have no metric in common, or the same folder is given twice.
    """
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if run.folder.resolve() == other.folder.resolve():
                raise ValueError(f"{run.folder} is given twice")
            if not _metrics(run) & _metrics(other):
                raise ValueError(
                    f"{other.folder} and {run.folder} can't be compared: their logs have no metric in common"
                )
    members: dict[Any, list[Run]] = {}
    for run in runs:
        members.setdefault(_configuration(run) or run.folder, []).append(run)
    groups = []
    for together in members.values():
        names = [run.name for run in together]
        name = names[0] if len(names) == 1 else f"{', '.join(names)}"
        groups.append(Group(name if len(name) < 40 else f"{names[0]} and {len(names) - 1} more", together))
    return groups


def _metrics(run: Run) -> set[str]:
    return {name for entry in run.logs for name, value in entry.items() if isinstance(value, int | float)} - {
        "step",
        "epoch",
    }


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(option, its value in each run) of the options that aren't the same in all, folders left out."""
    names = sorted({name for run in runs for name in run.config} - {"output_dir", "run_name", "logging_dir", STARTED})
    rows = []
    for name in names:
        values = [repr(run.config[name]) if name in run.config else "" for run in runs]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows


def mean_and_band(group: Group, name: str) -> dict[str, list[float]] | None:
    """Mean, lowest and highest over the group's runs at the steps that all of them logged, NaN where a run has none
    there; None where no step is in common."""
    by_step = [dict(zip(*run.curve(name), strict=True)) for run in group.runs]
    steps = sorted(set.intersection(*(set(one) for one in by_step))) if by_step else []
    if not steps:
        return None
    values = np.array([[one[step] for step in steps] for one in by_step], dtype=float)  # None: NaN
    return {
        "steps": steps,
        "mean": values.mean(0).tolist(),
        "low": values.min(0).tolist(),
        "high": values.max(0).tolist(),
    }
