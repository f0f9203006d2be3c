"""Groups runs that differ only by their seed, and lists what differs between configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .read_run import Run
from .run_files import STARTED

# options that differ between two runs of one configuration
NOT_CONFIGURATION = (
    *("seed", "data_seed", "output_dir", "run_name", "logging_dir", "hub_model_id", "resume_from_checkpoint"),
    *("logging_steps", "eval_steps", "save_steps", "report_to", STARTED),
)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, which differ by seed and folder."""

    name: str
    runs: list[Run]


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest value of several runs, by step."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """In the order given. A run without a configuration, or with a part of it (of another library's log), is a group of
    its own.

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
    members: dict[object, list[Run]] = {}
    for run in runs:
        same = tuple(sorted((k, repr(v)) for k, v in run.config.items() if k not in NOT_CONFIGURATION))
        members.setdefault(run.folder if run.source else same or run.folder, []).append(run)
    return [Group(_name(runs_of_one), runs_of_one) for runs_of_one in members.values()]


def _name(runs: list[Run]) -> str:
    name = ", ".join(run.name for run in runs)
    return name if len(runs) == 1 or len(name) < 40 else f"{runs[0].name} and {len(runs) - 1} more"


def _metrics(run: Run) -> set[str]:
    names = {name for entry in run.logs for name, value in entry.items() if isinstance(value, int | float)}
    return names - {"step", "epoch"}


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(option, its value in each run) of the options that aren't the same in all, folders left out."""
    names = sorted({name for run in runs for name in run.config} - {"output_dir", "run_name", "logging_dir", STARTED})
    rows = [(name, [repr(run.config[name]) if name in run.config else "" for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def mean_and_band(group: Group, name: str) -> Band | None:
    """Mean, lowest and highest over the group's runs at the steps that all of them logged, NaN where a run has none
    there; None where no step is in common."""
    by_step = [dict(run.curve(name).points) for run in group.runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        return None
    values = np.array([[one[step] for step in steps] for one in by_step], dtype=float)  # None: NaN
    return Band(steps, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist())
