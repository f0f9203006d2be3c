"""What the page's first screen says: did the run learn, what got in the way, and which experiment is next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .evidence import ends, noise, sampling_error
from .next_experiment import Change, hacked, next_experiment
from .read_run import Run
from .totals import mean, seconds
from .verdicts import Diagnosis

LEAST_POINTS = 4  # of fewer a change has no error, and isn't claimed
SMALL_CHANGE = 0.02  # of accuracy or reward, no change worth a word
WORTH_SHOWING = 0.01  # share of tokens, answers or seconds
EVALUATION = 0.1  # share of the seconds from which evaluation gets in the way


@dataclass(frozen=True)
class Obstacle:
    """Something that took a ``share`` of the run's answers, generated tokens or seconds (``of``)."""

    name: str
    share: float
    of: str


@dataclass(frozen=True)
class FirstScreen:
    """``learned`` is a sentence, ``cause`` one where the reward is hacked; ``obstacles`` begin with the largest;
    ``gradients``: whether prompts agree, and who dominates."""

    learned: str
    cause: str
    obstacles: list[Obstacle]
    gradients: list[str]
    changes: list[Change]

    def lines(self) -> list[str]:
        """The same as lines of text."""
        way = [f"{one.share:.0%} of the {one.of} {one.name}" for one in self.obstacles]
        changes = [f"{one.option} ({one.reason}); effect: {one.effect}" for one in self.changes]
        return [
            self.learned,
            *([self.cause] if self.cause else []),
            f"What got in the way: {'; '.join(way) or 'nothing that took 1 % or more'}.",
            *self.gradients,
            *(f"Try {change}." for change in changes),
        ]


def first_screen(run: Run, diagnosis: Diagnosis) -> FirstScreen:
    """Everything that the first screen says of a run."""
    return FirstScreen(
        learned(run), _cause(run), obstacles(run), gradients(run, diagnosis), next_experiment(run, diagnosis)
    )


# ---- did it learn?


def learned(run: Run) -> str:
    """A sentence with a 95 % interval of the change, on held-out questions where they were evaluated."""
    for name, label in (("eval_accuracy", "held-out accuracy"), ("eval_reward", "held-out reward")):
        steps, values = run.series(name)
        if len(values) > 1:
            counted = (
                sampling_error(run.evaluated_questions, (values[0], values[-1])) if name == "eval_accuracy" else 0.0
            )
            early = not counted and len(values) < LEAST_POINTS
            where = f"from step {steps[0]} to {steps[-1]}" + (_hacked_too(run) if hacked(run) else "")
            score = f"{label} {values[0]:.3f} → {values[-1]:.3f}"
            return _sentence(score, where, early, values[-1] - values[0], counted or scatter(values))
    values = run.series("reward")[1]
    if len(values) < 2:
        return "Whether it learned can't be told: fewer than two rewards are in the log."
    before, after = ends(values)
    error = scatter(values) / math.sqrt(max(1, round(len(values) / 10)))
    where = "from the first to the last tenth of the log; no held-out score is logged"
    score = f"reward in training {before:.3f} → {after:.3f}"
    return _sentence(score, where, len(values) < LEAST_POINTS, after - before, error)


def _hacked_too(run: Run) -> str:
    before, after = ends(run.series("reward")[1])
    return f", while the reward in training rose {before:.3f} → {after:.3f}"


def _sentence(score: str, where: str, early: bool, change: float, error: float) -> str:
    if early:
        return f"Too early to tell whether it learned: {score} {where}; its noise takes {LEAST_POINTS} measurements."
    half = 1.96 * error
    if abs(change) < max(SMALL_CHANGE, half):
        verdict = "It didn't change" if abs(change) < SMALL_CHANGE and half < SMALL_CHANGE else "No change can be told"
    else:
        verdict = "It learned" if change > 0 else "It got worse"
    return f"{verdict}: {score}, {change:+.3f} [95 %: {change - half:+.3f}, {change + half:+.3f}] {where}."


def scatter(values: Sequence[float]) -> float:
    """Standard error of the difference of two of the values, of whose trend nothing counts."""
    return math.sqrt(2) * noise(values) if len(values) >= LEAST_POINTS else 0.0


# ---- what got in the way?


def _cause(run: Run) -> str:
    if not hacked(run):
        return ""
    steps, values = run.series("eval_accuracy")
    best = int(np.argmax(values))
    return (
        "The reward pays for something other than being right; what follows may be a consequence. "
        f"The best held-out accuracy was {values[best]:.3f}, at step {steps[best]}."
    )


def obstacles(run: Run) -> list[Obstacle]:
    """What took most of the answers, tokens or seconds, the largest share first."""
    found = [
        Obstacle(f"in dead groups{_kinds(run)}", mean(run, "normalization/zero_variance_frac"), "answers"),
        Obstacle("in truncated answers", truncated_tokens(run), "generated tokens"),
        Obstacle("without a reward", mean(run, "normalization/unscorable_frac"), "answers"),
        Obstacle("clipped", mean(run, "clip_ratio/region_mean"), "trained tokens"),
        *_slow(run),
    ]
    return sorted((one for one in found if one.share >= WORTH_SHOWING), key=lambda one: -one.share)


def _kinds(run: Run) -> str:
    """A group of equal rewards counts as "right" where they are above the middle of the batch's."""
    shares = [
        (word, mean(run, f"normalization/all_{kind}_frac")) for kind, word in (("right", "high"), ("wrong", "low"))
    ]
    told = ", ".join(f"{share:.0%} all {word}" for word, share in shares if share >= WORTH_SHOWING)
    return f" (rewards: {told})" if told else ""


def truncated_tokens(run: Run) -> float:
    """Share of the generated tokens that are in truncated answers: each has ``max_completion_length`` of them."""
    limit, length = run.config.get("max_completion_length"), mean(run, "completions/mean_length")
    if not isinstance(limit, int) or not length:
        return 0.0
    return min(1.0, mean(run, "completions/clipped_ratio") * limit / length)


def _slow(run: Run) -> list[Obstacle]:
    spent = seconds(run)
    whole = sum(spent.values())
    if not whole or "training" not in spent:
        return []
    found = [Obstacle("in reward functions", spent.get("rewards", 0.0) / whole, "seconds")]
    if spent.get("evaluation", 0.0) > EVALUATION * whole:
        found.append(Obstacle("in evaluation", spent["evaluation"] / whole, "seconds"))
    return found


# ---- the prompts' gradients, apart from the ranking


def gradients(run: Run, diagnosis: Diagnosis) -> list[str]:
    """How far prompts agree, how much is noise, and who dominates, in a sentence each."""
    found = [f"{one.evidence[0].upper()}{one.evidence[1:]}." for one in diagnosis.verdicts if one.name == "dominated"]
    alignment = aligned(run)
    if alignment is not None:
        found.insert(0, alignment)
    elif run.records:
        found.insert(0, "Whether the prompts' gradients agree can't be told from noise.")
    return found


def aligned(run: Run) -> str | None:
    """The latest alignment with its interval; None where none is logged."""
    for name, kind in (("interference/alignment", ""), ("interference/alignment_trained", ", as trained")):
        logged = [run.series(f"{name}{end}")[1] for end in ("", "_low", "_high")]
        if all(logged):
            value, low, high = (values[-1] for values in logged)
            bound = max(abs(low), abs(high))
            effect = "help one another" if low > 0 else "oppose one another"
            effect = effect if low > 0 or high < 0 else f"help or hinder one another by {bound:.2f} of 1 at most"
            return (
                f"Prompts {effect} (alignment{kind} {value:.2f}, 95 %: {low:.2f} to {high:.2f}; 1: the same direction)."
            )
    return None
