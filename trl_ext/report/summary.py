"""A run in five lines, and its training phases."""

from __future__ import annotations

import math

import numpy as np

from .read_run import Run

# where something is said to be wrong
LOW_COVERAGE, LOW_RELIABILITY, MOSTLY_DEAD, HIGH_ADVANTAGE = 0.9, 0.1, 0.9, 10.0


def phases(run: Run) -> list[dict[str, int]]:
    """Spans of steps in which the same phase was told: ``phase``, ``first``, ``last``."""
    spans: list[dict[str, int]] = []
    for step, value in zip(*run.series("phase"), strict=True):
        if not spans or spans[-1]["phase"] != int(value):
            if spans:
                spans[-1]["last"] = step
            spans.append({"phase": int(value), "first": step, "last": step})
        spans[-1]["last"] = step
    return spans


def summary(run: Run) -> list[str]:
    """Did it learn, which phase, does normalising help here by theory, what was saved, is anything wrong."""
    return [_learned(run), _phase(run), _theory(run), _compute(run), _wrong(run)]


def _learned(run: Run) -> str:
    steps, values = run.series("eval_accuracy")
    if len(values) > 1:
        change = values[-1] - values[0]
        word = "learned" if change > 0.02 else "got worse" if change < -0.02 else "did not change"
        return f"It {word}: held-out accuracy {values[0]:.3f} at step {steps[0]}, {values[-1]:.3f} at step {steps[-1]}."
    values = run.series("reward")[1]
    if len(values) < 2:
        return "Whether it learned can't be told: fewer than two rewards are in the log."
    tenth = max(1, len(values) // 10)
    before, after = np.mean(values[:tenth]), np.mean(values[-tenth:])
    word = "rose" if after > before else "fell"
    moved = f"from {before:.3f} to {after:.3f}, first and last tenth of the log"
    return f"Reward {word} {moved}; held-out accuracy isn't logged."


def _phase(run: Run) -> str:
    spans = phases(run)
    if not spans:
        return "Its phase can't be told: too few live prompts, too low a reliability, or no interference logged."
    meaning = {1: "gradients of prompts are near-orthogonal", 2: "they begin to interfere", 3: "they interfere"}
    last = spans[-1]
    return f"Phase {last['phase']} at step {last['last']}: {meaning[last['phase']]}."


def _theory(run: Run) -> str:
    constant = run.last("curvature/speedup_constant")
    if constant is None:
        return "Theory can't tell whether normalising helps: no C (rewards outside [0, 1], or no interference logged)."
    helps = "converges faster with" if constant < 1 else "gains nothing from"
    return f"By theory (Theorem 3.2) this run {helps} division by the std: C = {constant:.2f}, and 1 is the border."


def _compute(run: Run) -> str:
    values = run.series("compute/sequences_skipped_frac")[1]
    if not values:
        return "What was saved by skipping isn't in the log."
    saved = run.series("compute/flops_saved_frac")[1]
    skipped = f"{np.mean(values):.0%} of the sequences had no gradient and did not run"
    return f"{skipped}; {np.mean(saved):.0%} of the backbone's work was saved."


def _wrong(run: Run) -> str:
    found = []
    coverage, reliability = run.last("interference/coverage"), run.last("interference/reliability")
    if coverage is not None and coverage < LOW_COVERAGE:
        found.append(f"the sketch sees only {coverage:.0%} of the gradient")
    if reliability is not None and reliability < LOW_RELIABILITY:
        found.append(f"reliability is {reliability:.2f}: cosines are mostly rollout noise")
    dead = run.series("normalization/zero_variance_frac")[1]
    if dead and np.mean(dead[-10:]) > MOSTLY_DEAD:
        found.append(f"{np.mean(dead[-10:]):.0%} of the groups have equal rewards: nothing is left to learn from")
    spikes = [value for value in run.series("normalization/advantage_max")[1] if value > HIGH_ADVANTAGE]
    if spikes:
        found.append(f"{len(spikes)} logged steps have an advantage above {HIGH_ADVANTAGE:g}")
    bad = [entry["step"] for entry in run.logs if any(isinstance(v, float) and math.isnan(v) for v in entry.values())]
    if bad:
        found.append(f"NaN in the log, first at step {bad[0]}")
    found += run.problems
    return f"Wrong: {'; '.join(found)}." if found else "Nothing looks wrong."
