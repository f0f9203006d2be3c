"""A run in five lines, and its training phases."""

from __future__ import annotations

import math

import numpy as np

from .read_run import Run

# where something is said to be wrong
LOW_COVERAGE, LOW_RELIABILITY, MOSTLY_DEAD, HIGH_ADVANTAGE = 0.9, 0.1, 0.9, 10.0
SPIKE, FALLEN = 100, 0.1  # of gradient norms over their median; of accuracy below its best
SMALL_CHANGE = 0.02  # of accuracy or reward, no change worth a word


def phases(run: Run) -> list[dict[str, int]]:
    """Spans of steps in which the same phase was told: ``phase``, ``first``, ``last``."""
    spans: list[dict[str, int]] = []
    for step, value in zip(*run.series("phase"), strict=True):
        if round(value) not in (1, 2, 3):
            continue
        if not spans or spans[-1]["phase"] != round(value):
            if spans:
                spans[-1]["last"] = step
            spans.append({"phase": round(value), "first": step, "last": step})
        spans[-1]["last"] = step
    return spans


def summary(run: Run) -> list[str]:
    """Did it learn, which phase, does normalising help here by theory, what was saved, is anything wrong."""
    return [_learned(run), _phase(run), _theory(run), _compute(run), _wrong(run)]


def _learned(run: Run) -> str:
    steps, values = run.series("eval_accuracy")
    if len(values) > 1:
        first, last = f"{values[0]:.3f} at step {steps[0]}", f"{values[-1]:.3f} at step {steps[-1]}"
        return f"It {_moved(values[0], values[-1])}: held-out accuracy {first}, {last}."
    values = run.series("reward")[1]
    if len(values) < 2:
        return "Whether it learned can't be told: fewer than two rewards are in the log."
    tenth = max(1, len(values) // 10)
    before, after = float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))
    change = f"from {before:.3f} to {after:.3f}, first and last tenth of the log"
    return f"By its reward it {_moved(before, after)}: {change}; held-out accuracy isn't logged."


def _moved(before: float, after: float) -> str:
    change = after - before
    return "learned" if change > SMALL_CHANGE else "got worse" if change < -SMALL_CHANGE else "did not change"


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
    values, saved = run.series("compute/sequences_skipped_frac")[1], run.series("compute/flops_saved_frac")[1]
    if not values or not saved:
        return "What was saved by skipping isn't in the log."
    skipped = f"{np.mean(values):.0%} of the sequences had no gradient and did not run"
    return f"{skipped}; {np.mean(saved):.0%} of the backbone's work was saved."


def _wrong(run: Run) -> str:
    found = []
    coverage = run.series("interference/coverage")[1]
    if low := sum(value < LOW_COVERAGE for value in coverage):
        found.append(f"at {low} of {len(coverage)} logged steps the sketch sees less than {LOW_COVERAGE:.0%} of it all")
    reliability = run.series("interference/reliability")[1]
    if 2 * (low := sum(value < LOW_RELIABILITY for value in reliability)) > len(reliability):
        found.append(
            f"at {low} of {len(reliability)} logged steps reliability is below {LOW_RELIABILITY}: mostly noise"
        )
    dead = run.series("normalization/zero_variance_frac")[1][-10:]
    if dead and np.mean(dead) > MOSTLY_DEAD:
        found.append(f"{np.mean(dead):.0%} of the groups have equal rewards: nothing is left to learn from")
    if spikes := sum(value > HIGH_ADVANTAGE for value in run.series("normalization/advantage_max")[1]):
        found.append(f"{spikes} logged steps have an advantage above {HIGH_ADVANTAGE:g}")
    norms = run.series("grad_norm")[1]
    if norms and (spikes := sum(value > SPIKE * max(float(np.median(norms)), 1e-12) for value in norms)):
        found.append(f"{spikes} logged steps have a gradient norm above {SPIKE} times the median")
    steps, accuracy = run.series("eval_accuracy")
    if accuracy and max(accuracy) - accuracy[-1] > FALLEN:
        best = steps[accuracy.index(max(accuracy))]
        found.append(f"held-out accuracy has fallen from its best, {max(accuracy):.3f} at step {best}")
    odd = [e["step"] for e in run.logs if any(isinstance(v, float) and not math.isfinite(v) for v in e.values())]
    if odd:
        found.append(f"NaN or infinity in the log, first at step {odd[0]}")
    found += run.problems
    return f"Wrong: {'; '.join(found)}." if found else "Nothing looks wrong."
