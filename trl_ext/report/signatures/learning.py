"""Signatures of what is learned, on training and on held-out problems."""

from __future__ import annotations

import math
import statistics

import numpy as np

from trl_ext.report.evidence import above, block_means, largest_fall, noise, sampling_error, state, student
from trl_ext.report.read_run import Run, trains

from .finding import ADVICE, CRITICAL, WARNING, Finding, Found, Unknown, missing, too_few

GAP = {False: 0.15, True: 0.04}  # of reward, more than at the start; on fresh and on repeated problems
WINDOW, SOON = (
    50,
    5,
)  # training steps that an evaluation is compared with: before it; for the one at step 0 the first ones
ERRORS = 2.0  # standard errors by which a gap exceeds its limit: without them 9 of 12 healthy seeds had one
OVER = 10  # logged numbers after the last odd one, from which on it is over
FALLEN = 0.1  # of held-out accuracy, below its best
COLLAPSE = 0.5  # of the range of the reward
DEVIATIONS = 8.0  # of a fall, above those of noise
MOST_REWARDS = 10_000  # looked at for a fall; more are averaged, as the memory grows with their square (0.2 GB)
SOLVED = 0.9  # of a reward in [0, 1]
SMALL = 0.1  # of an answer's std: a change of the mean reward below it is none
NUMBERS = ("loss", "grad_norm", "reward", "kl")  # that must be finite
STEPS = 30  # logged, before a run that doesn't move is said not to


def gap(run: Run) -> Found:
    """Training and held-out reward apart, by more than at the first evaluation."""
    for train, held_out in (("accuracy", "eval_accuracy"), ("reward", "eval_reward")):
        (steps, values), (eval_steps, eval_values) = run.series(train), run.series(held_out)
        if steps and len(eval_steps) > 1:
            break
    else:
        name = "accuracy" if run.series("eval_accuracy")[0] else "reward"
        return too_few(run, 2, name, f"eval_{name}")
    apart: list[tuple[int, float, int]] = []  # at each evaluation: its step, the gap, of how many training rewards
    for i, (step, value) in enumerate(zip(eval_steps, eval_values, strict=True)):
        since = max(eval_steps[i - 1] if i else 0, step - WINDOW)
        near = [v for s, v in zip(steps, values, strict=True) if since < s <= step]
        if not near and i == 0:
            near = _at_the_start(run, train)
        if near:
            apart.append((step, float(np.mean(near)) - value, len(near)))
    if len(apart) < 2:
        return Unknown(f"fewer than 2 steps have both {train} and {held_out}")
    _, begun, first = apart[0]
    changes = [value - begun for _, value, _ in apart[1:]]
    scatter, eval_noise = noise(values), 1.48 * float(np.median(np.abs(np.diff(eval_values))))
    errors = [math.hypot(scatter * math.sqrt(1 / first + 1 / count), eval_noise) for _, _, count in apart[1:]]
    beyond = [change - ERRORS * error for change, error in zip(changes, errors, strict=True)]
    epochs = max(run.series("epoch")[1], default=None)
    repeated = epochs is not None and epochs > 1
    seen = (
        "the log doesn't say how often the training problems were seen (epoch)"
        if epochs is None
        else (f"the training problems were seen {epochs:.1f} times" if repeated else "on problems that are seen once")
    )
    found = state([step for step, _, _ in apart[1:]], beyond, above(GAP[repeated]), least=min(2, len(changes)))
    if found is None or beyond[-1] < GAP[repeated]:
        return None
    evidence = (
        f"in training the {train} is {apart[-1][1]:.2f} above the held-out one ({eval_values[-1]:.2f}), "
        f"{changes[-1]:.2f} more than at the first evaluation; {seen}"
    )
    remedy = (
        "More or other training problems, fewer epochs, beta > 0; save_strategy with metric_for_best_model "
        "keeps the best."
        if repeated
        else "Do both sets have the same difficulty and form, and the same reward? Look at held-out answers."
    )
    return Finding(ADVICE if repeated else WARNING, found.onset, evidence, found.confidence, remedy)


def _at_the_start(run: Run, name: str) -> list[float]:
    """The first steps' mean rewards or accuracies, for an evaluation at step 0."""
    steps, values = run.series(name)
    soon = [value for step, value in zip(steps, values, strict=True) if step <= SOON]
    first = next((r for r in run.records if r.step <= 1), None)
    if len(soon) < 2 and first is not None and (name == "reward" or np.isin(first.reward_B, (0.0, 1.0)).all()):
        return [float(np.nanmean(first.reward_B))]  # its file's, where the log has means of several steps
    return soon


def fell(run: Run) -> Found:
    """The reward has lost half of its range, or held-out accuracy is far below its best, both beyond their noise."""
    steps, values = run.series("eval_accuracy")
    reward_steps, rewards = block_means(*run.series("reward"), MOST_REWARDS)
    if len(rewards) >= 10:
        best, fall, deviations = largest_fall(rewards)
        smooth = np.convolve(rewards, np.ones(5) / 5, mode="valid")
        least = max(COLLAPSE * float(smooth[best] - smooth.min()), SMALL * _answer_std(run))
        if deviations > DEVIATIONS and fall > least:
            around = reward_steps[best + 2]
            held_out = _held_out_fell(run)
            evidence = f"the reward has fallen from {smooth[best]:.3f} (about step {around}) to {smooth[-1]:.3f}; " + (
                "the held-out score too" if held_out else "the held-out score has not, or isn't measured"
            )
            remedy = "A lower learning_rate, max_grad_norm, beta > 0; go on from an earlier checkpoint."
            return Finding(CRITICAL if held_out else WARNING, reward_steps[best + 4], evidence, 0.95, remedy)
    if len(values) < 4:
        either = (too_few(run, 10, "reward"), too_few(run, 4, "eval_accuracy"))
        return Unknown("; ".join(one.reason for one in either)) if len(rewards) < 10 else None
    pairs = np.convolve(values, np.ones(2) / 2, mode="valid")  # the best of many single ones is best by chance
    best = int(np.argmax(pairs))
    drop = float(pairs[best] - pairs[-1])
    # of a mean of two; the fall itself isn't noise, so that the number of questions tells more, where it is logged
    error = sampling_error(run.evaluated_questions, (pairs[best],)) / math.sqrt(2) or float(np.std(np.diff(values))) / 2
    if drop <= FALLEN or drop <= 5 * error:
        return None
    evidence = (
        f"held-out accuracy has fallen from {pairs[best]:.3f} (steps {steps[best]} and {steps[best + 1]}) to "
        f"{pairs[-1]:.3f} (the last two)"
    )
    remedy = "load_best_model_at_end with metric_for_best_model; a lower learning_rate; fewer epochs."
    sure = _normal(drop, math.sqrt(2) * error)
    return Finding(WARNING, steps[min(best + 2, len(steps) - 1)], evidence, sure, remedy)


def _held_out_fell(run: Run) -> bool:
    """Whether the mean of the last two evaluations is below the best mean of two, by a tenth and by two errors."""
    for name in ("eval_accuracy", "eval_reward"):
        values = run.series(name)[1]
        if len(values) > 3:
            pairs = np.convolve(values, np.ones(2) / 2, mode="valid")
            noise = float(np.median(np.abs(np.diff(values)))) / 2
            return float(pairs.max() - pairs[-1]) > max(FALLEN, 2 * noise)
    return False


def _answer_std(run: Run) -> float:
    """The mean std of single answers' rewards, 0 where it isn't logged."""
    spreads = run.series("reward_std")[1]
    return float(np.mean(spreads)) if spreads else 0.0


def _normal(value: float, error: float) -> float:
    """The probability that a normal variable of this standard error is below ``value``."""
    return statistics.NormalDist().cdf(value / error) if error else 1.0


def no_progress(run: Run) -> Found:
    """An equivalence test: the 95 % intervals of the reward's change from the first third to the second and to the last
    lie within a tenth of one answer's std."""
    (steps, values), effect = run.series("reward"), SMALL * _answer_std(run)
    if len(values) < STEPS:
        return Unknown(f"fewer than {STEPS} rewards in the log (logging_steps)")
    if not effect:
        return missing("reward_std")
    third = len(values) // 3
    before, middle, after = (np.array(values[i * third : (i + 1) * third]) for i in range(3))
    if 0 <= min(values) and SOLVED < float(after.mean()) <= 1:
        return None  # there is hardly anything left to learn
    changes = []
    for later in (middle, after):
        change = float(later.mean() - before.mean())
        half = student(2 * third - 2, 0.025) * math.sqrt((before.var(ddof=1) + later.var(ddof=1)) / third)
        if abs(change) + half >= effect:
            return None
        changes.append((change, half))
    change, half = changes[-1]
    evidence = (
        f"the reward changed by {change:+.3f} [{change - half:+.3f}, {change + half:+.3f}] from the first third to the "
        f"last: within a tenth of an answer's std, {effect:.3f}"
    )
    remedy = "A higher learning_rate (several times), or more steps; is grad_norm above 0?"
    return Finding(ADVICE, steps[0], evidence, 0.95, remedy)


def not_finite(run: Run) -> Found:
    odd = [
        (int(entry["step"]), name)
        for entry in run.logs
        for name, value in entry.items()
        if name in NUMBERS and isinstance(value, float) and not math.isfinite(value)
    ]
    if not odd:
        seen = any(name in entry for entry in run.logs for name in NUMBERS)
        return None if seen else Unknown(f"none of {', '.join(NUMBERS)} is in the log")
    step, name = odd[0]
    over = sum(1 for entry in run.logs if entry["step"] > odd[-1][0] and trains(entry)) >= OVER
    evidence = f"{name} is NaN or infinite, first at step {step}, {len(odd)} times in all"
    remedy = (
        "Go on from a checkpoint before it with a lower learning_rate; bf16 in place of fp16; look at the "
        "rewards of that step."
    )
    return Finding(WARNING if over else CRITICAL, step, evidence, 0.99, remedy)
