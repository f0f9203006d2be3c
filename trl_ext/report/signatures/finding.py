"""What a signature gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trl_ext.report.read_run import Run

CRITICAL, WARNING, ADVICE = "critical", "warning", "advice"


@dataclass(frozen=True)
class Finding:
    """What a signature found; the fields are ``Verdict``'s."""

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


def either(run: Run, *names: str) -> tuple[str, list[int], list[float]]:
    """The first of them that was logged."""
    for name in names:
        steps, values = run.series(name)
        if steps:
            return name, steps, values
    return names[0], [], []
