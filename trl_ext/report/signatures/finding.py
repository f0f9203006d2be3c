"""What a signature returns, and the signatures of one metric that stays beyond a threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trl_ext.report.evidence import state
from trl_ext.report.read_run import Run

CRITICAL, WARNING, ADVICE = "critical", "warning", "advice"
Series = tuple[Sequence[int], Sequence[float]]  # steps, values
Evidence = Callable[[float], str]  # the text, from the mean of the values since the onset
Levels = Mapping[str, Callable[[float], bool]]  # level, from the gravest on -> whether a value is that bad


@dataclass(frozen=True)
class Finding:
    """What a signature found. ``onset``: the first step; ``confidence`` in [0, 1]: ``evidence.State``'s, that of a 95 %
    interval, or what the signature says; ``remedy`` names options."""

    level: str
    onset: int
    evidence: str
    confidence: float
    remedy: str


@dataclass(frozen=True)
class Unknown:
    """The run doesn't log what the signature needs."""

    reason: str


Found = Finding | Unknown | None


@dataclass(frozen=True)
class Signature:
    """``explains``: signatures that only follow from this one, and are left out where this one is found."""

    title: str
    find: Callable[[Run], Found]
    explains: tuple[str, ...] = ()


def missing(*names: str) -> Unknown:
    return Unknown(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not in the log")


def no_files() -> Unknown:
    """The reason where the prompts' gradients weren't recorded."""
    return Unknown("the run has no interference files (CurvatureGRPOTrainer writes them, interference_every > 0)")


def too_few(run: Run, least: int, *names: str) -> Unknown:
    """The reason where not every metric is logged ``least`` times: not at all, or not often enough yet."""
    absent = [name for name in names if not run.series(name)[0]]
    if absent:
        return missing(*absent)
    logged = min(len(run.series(name)[0]) for name in names)
    return Unknown(f"{' and '.join(names)}: {least} log lines are needed, {logged} are there")


def either(run: Run, *names: str) -> str:
    """The first of these metrics that was logged; the first of all where none was."""
    return next((name for name in names if run.series(name)[0]), names[0])


def lasting(series: Series, levels: Levels, evidence: Evidence, remedy: str) -> Finding | None:
    """The gravest level that holds from some step to the end."""
    for level, bad in levels.items():
        found = state(*series, bad)
        if found is not None:
            return Finding(level, found.onset, evidence(found.mean), found.confidence, remedy)
    return None


def stays(title: str, name: str, levels: Levels, evidence: Evidence, remedy: str, why: str = "") -> Signature:
    """The signature of a metric that stays beyond a threshold. ``why``: why it may not be logged."""

    def find(run: Run) -> Found:
        series = run.series(name)
        if not series[0]:
            return Unknown(missing(name).reason + why)
        return lasting(series, levels, evidence, remedy)

    return Signature(title, find)
