"""What a signature gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trl_ext.report.evidence import State, above, state
from trl_ext.report.read_run import Run

CRITICAL, WARNING, ADVICE = "critical", "warning", "advice"


@dataclass(frozen=True)
class Finding:
    """What a signature found. ``onset``: the step since when; ``confidence`` in [0, 1]: ``evidence.State``'s, of a 95 %
    interval, or what the signature says; ``remedy`` names options."""

    level: str
    onset: int
    evidence: str
    confidence: float
    remedy: str


@dataclass(frozen=True)
class Unknown:
    """The run doesn't log what it takes."""

    reason: str


@dataclass(frozen=True)
class Signature:
    """``explains``: others that are but a consequence, and aren't told where this one is."""

    title: str
    find: Callable[[Run], Finding | Unknown | None]
    explains: tuple[str, ...] = ()


def missing(*names: str) -> Unknown:
    return Unknown(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not in the log")


def too_few(run: Run, least: int, *names: str) -> Unknown:
    """Each of these metrics must be logged ``least`` times, and isn't: not at all, or not often enough yet."""
    absent = [name for name in names if not run.series(name)[0]]
    if absent:
        return missing(*absent)
    logged = min(len(run.series(name)[0]) for name in names)
    return Unknown(f"{' and '.join(names)}: {least} log lines are needed, {logged} are there")


def either(run: Run, *names: str) -> tuple[str, list[int], list[float]]:
    """The first of them that was logged."""
    for name in names:
        steps, values = run.series(name)
        if steps:
            return name, steps, values
    return names[0], [], []


def lasting(
    run: Run,
    name: str,
    bad: Callable[[float], bool],
    level: str,
    evidence: Callable[[State], str],
    remedy: str,
    *,
    low: bool = False,
) -> Finding | Unknown | None:
    """Of the usual signature: a state of one metric. ``low``: the worst is the smallest."""
    steps, values = run.series(name)
    if not steps:
        return missing(name)
    found = state(steps, values, bad, low=low)
    return None if found is None else Finding(level, found.onset, evidence(found), found.confidence, remedy)


def graded(
    steps: Sequence[int], values: Sequence[float], borders: Mapping[str, float]
) -> tuple[str, State] | tuple[None, None]:
    """The gravest level whose border is passed, and the state; ``borders`` from the gravest on."""
    for level, border in borders.items():
        found = state(steps, values, above(border))
        if found is not None:
            return level, found
    return None, None
