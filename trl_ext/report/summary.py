"""Describes a run in five sentences, five tiles and its training phases; ``verdicts.py`` says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .evidence import ends, interval
from .read_run import Run
from .what_if_table import WhatIfTable

LEAST_POINTS = 4  # of fewer a change has no error, and isn't claimed
SMALL_CHANGE = 0.02  # of accuracy or reward, no change worth a word
HARD = 0.2  # mean reward below which prompts are hard: max_rl gained in the lab at 0.1, nothing at 0.5
OTHER_DIRECTION = 0.98  # mean cosine below which std is more than a learning rate


@dataclass(frozen=True)
class Span:
    """Steps ``first`` to ``last`` have the same training phase: 1, 2 or 3."""

    phase: int
    first: int
    last: int


@dataclass(frozen=True)
class Tile:
    """A number that is looked at first; "-" where it isn't logged."""

    label: str
    value: str = "-"
    note: str = "not logged"


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


def summary(run: Run) -> list[str]:
    """Five sentences: did it learn, which phase, does normalising help by theory and as measured, which normalisation
    to choose, what was saved."""
    return [_learned(run), _phase(run), _theory(run), _choice(run), _compute(run)]


def _learned(run: Run) -> str:
    for name, label in (("eval_accuracy", "held-out accuracy"), ("eval_reward", "held-out reward")):
        steps, values = run.series(name)
        if len(values) < 2:
            continue
        error = _accuracy_error(run, values) if name == "eval_accuracy" else _scatter(values)
        first, last = f"{values[0]:.3f} at step {steps[0]}", f"{values[-1]:.3f} at step {steps[-1]}"
        if len(values) < LEAST_POINTS:
            return (
                f"Too early to tell whether it learned: {label} {first}, {last}, measured {len(values)} times "
                f"(it takes {LEAST_POINTS})."
            )
        scatter = f" (a difference has an error of about {error:.3f})" if error else ""
        return f"It {_moved(values[0], values[-1], error)}: {label} {first}, {last}{scatter}."
    values = run.series("reward")[1]
    if len(values) < 2:
        return "Whether it learned can't be told: fewer than two rewards are in the log."
    if len(values) < LEAST_POINTS:
        return (
            f"Too early to tell whether it learned: {len(values)} rewards are in the log, from {values[0]:.3f} to "
            f"{values[-1]:.3f} (it takes {LEAST_POINTS})."
        )
    before, after = ends(values)
    error = _scatter(values) / math.sqrt(max(1, round(len(values) / 10)))
    return (
        f"By its reward it {_moved(before, after, error)}: from {before:.3f} to {after:.3f}, first and last tenth of "
        "the log; held-out accuracy isn't logged."
    )


def _accuracy_error(run: Run, values: Sequence[float]) -> float:
    """Standard error of the difference of two accuracies, by how many questions TRL's log says were evaluated; 0 where
    it doesn't say."""
    seconds, speed = run.last("eval_runtime"), run.last("eval_samples_per_second")
    questions = (seconds or 0.0) * (speed or 0.0)
    if questions < 1:
        return 0.0
    return math.sqrt(sum(value * (1 - value) / questions for value in (values[0], values[-1]) if 0 <= value <= 1))


def _scatter(values: Sequence[float]) -> float:
    """Std of the differences of neighbours, which a trend doesn't change; 0 of fewer than four values."""
    return float(np.std(np.diff(values))) if len(values) > 3 else 0.0


def _moved(before: float, after: float, error: float) -> str:
    change = after - before
    if abs(change) < max(SMALL_CHANGE, 2 * error):
        return "did not change" if abs(change) < SMALL_CHANGE else "did not change by more than its noise"
    return "learned" if change > 0 else "got worse"


def _phase(run: Run) -> str:
    spans = phases(run)
    if not spans:
        return "Its phase can't be told: too few live prompts, an unknown alignment, or no interference logged."
    meaning = {1: "gradients of prompts are near-orthogonal", 2: "they begin to interfere", 3: "they interfere"}
    last = spans[-1]
    since = f"since step {last.first}, last measured at step {last.last}"
    return f"Phase {last.phase} {since}: {meaning[last.phase]}."


def _theory(run: Run) -> str:
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


def _choice(run: Run) -> str:
    """The table of docs/which-normalisation.md; the log can't tell whether rewards are verified."""
    advice = "Which normalisation: std if the rewards are verified, std or mean if they may be wrong."
    rewards = run.series("reward")[1]
    in_unit = run.last("curvature/speedup_constant") is not None  # there is a C of rewards in [0, 1] alone
    if not in_unit or not rewards or (first := ends(rewards)[0]) >= HARD:
        return advice
    hard = f"The prompts were hard at first (mean reward {first:.2f})"
    return f"{advice} {hard}: with verified rewards try max_rl too, at a learning rate of its own."


def _compute(run: Run) -> str:
    values, saved = run.series("compute/sequences_skipped_frac")[1], run.series("compute/flops_saved_frac")[1]
    if not values or not saved:
        return "What was saved by skipping isn't in the log."
    skipped = f"{np.mean(values):.0%} of the sequences had no gradient and did not run"
    return f"{skipped}; {np.mean(saved):.0%} of the backbone's work was saved."


def tiles(run: Run, what_if: WhatIfTable | None) -> list[Tile]:
    dead, saved = (run.series(name)[1] for name in ("normalization/zero_variance_frac", "compute/flops_saved_frac"))
    live = f"{1 - np.mean(dead):.0%}" if dead else "-"
    work = f"{np.mean(saved):.0%}" if saved else "-"
    return [
        _score(run),
        Tile("Live groups", live, "answers of different reward, mean over the run"),
        Tile("Dividing by the std is", *_what_std_is(what_if)),
        Tile("Alignment of prompts", *_alignment(run)),
        Tile("Work saved", work, "of the backbone's token positions"),
    ]


def _alignment(run: Run) -> tuple[str, str]:
    for name, kind in (("interference/alignment", ""), ("interference/alignment_trained", " as trained")):
        ends = [run.series(f"{name}{end}")[1] for end in ("", "_low", "_high")]
        if all(ends):
            value, low, high = (end[-1] for end in ends)
            return f"{value:.2f}", f"of their gradients{kind}; 95 %: {low:.2f} to {high:.2f}"
    return "-", "can't tell: too little signal, or not logged"


def _score(run: Run) -> Tile:
    name, label = ("eval_accuracy", "accuracy") if run.series("eval_accuracy")[0] else ("eval_reward", "reward")
    (steps, values), rewards = run.series(name), run.series("reward")[1]
    if len(values) > 1:
        change = f"{values[0]:.2f} → {values[-1]:.2f}"
        return Tile(f"Held-out {label}", change, f"at steps {steps[0]} and {steps[-1]}")
    if len(rewards) > 1:
        before, after = ends(rewards)
        return Tile("Reward", f"{before:.2f} → {after:.2f}", "first and last tenth of the log")
    return Tile(f"Held-out {label}")


def _what_std_is(what_if: WhatIfTable | None) -> tuple[str, str]:
    """Value and note of a tile."""
    if what_if is None or not {"std", "mean"} <= set(what_if.methods):
        return "-", "not told in this run"
    if what_if.used not in ("std", "mean"):
        return "-", f"the run used {what_if.used or 'a function'}"
    row = what_if.methods["mean" if what_if.used == "std" else "std"]
    length, rate = 1 / row.factor if what_if.used == "std" else row.factor, what_if.methods["mean"].rate
    against = f"against mean, cosine {row.cos:.3f}, by their steps' lengths"
    if rate is not None:
        against += f"; best rate × {rate.value:.2g}, 95 %: {rate.low:.2g} to {rate.high:.2g}"
    if what_if.ignores_a_steady_factor:
        against += f"; {str(what_if.optimizer).split('_')[0]} ignores a steady one"
    if row.cos < OTHER_DIRECTION:
        return "another direction", f"{against} × {length:.2g}"
    return f"a {'learning rate' if row.kind == 'rate' else 'schedule'} × {length:.2g}", against
