"""Describes a run by the theory: its training phases, and what the theorem's constant C predicts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .evidence import interval
from .read_run import Run


@dataclass(frozen=True)
class Span:
    """Steps ``first`` to ``last`` have the same training phase: 1, 2 or 3."""

    phase: int
    first: int
    last: int


def phases(run: Run) -> list[Span]:
    """The spans in order of steps. A step without a phase ends a span."""
    spans: list[Span] = []
    previous = 0
    for step, value in run.curve("phase").points:
        phase = round(value) if value is not None and round(value) in (1, 2, 3) else 0
        if previous and phase:
            spans[-1] = replace(spans[-1], last=step)
        if phase and phase != previous:
            spans.append(Span(phase, step, step))
        previous = phase
    return spans


def theory(run: Run) -> list[str]:
    """Two sentences: the phase, and what the theorem predicts."""
    return [_phase(run), _theorem(run)]


def _phase(run: Run) -> str:
    spans = phases(run)
    if not spans:
        return "Its phase can't be told: too few live prompts, an unknown alignment, or no interference logged."
    meaning = {1: "gradients of prompts are near-orthogonal", 2: "they begin to interfere", 3: "they interfere"}
    last = spans[-1]
    since = f"since step {last.first}, last measured at step {last.last}"
    return f"Phase {last.phase} {since}: {meaning[last.phase]}."


def _theorem(run: Run) -> str:
    """What the theorem predicts for this run, and whether its assumption was measured here."""
    constant = run.last("curvature/speedup_constant")
    if constant is None:
        return "Theory can't tell whether normalising helps: no C (rewards outside [0, 1], or no interference logged)."
    helps = "converges faster with" if constant < 1 else "gains nothing from"
    predicted = f"By theory (Theorem 3.2) this run {helps} division by the std (C = {constant:.2f}, border 1)"
    values = run.series("curvature/directional_corr")[1]
    if len(values) < 3:
        return f"{predicted}; whether sigma follows the curvature wasn't measured often enough."
    mean, low, high = interval(values)
    verdict = "it follows it" if low > 0 else "it doesn't, against the theory" if high < 0 else "can't tell"
    return (
        f"{predicted}, if sigma follows the curvature. Measured, they correlate by {mean:+.2f} [{low:+.2f}, "
        f"{high:+.2f}] over {len(values)} steps: {verdict}."
    )
