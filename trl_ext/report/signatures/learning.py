"""Of what is learned: on training and on held-out problems."""

from __future__ import annotations

import math

import numpy as np

from trl_ext.report.evidence import above, state
from trl_ext.report.read_run import Run

from .finding import ADVICE, CRITICAL, WARNING, Finding, Unknown, either, missing

GAP = {False: 0.15, True: 0.04}  # of reward, more than at the start; on fresh and on repeated problems
FALLEN = 0.1  # of held-out accuracy, below its best
COLLAPSE = 0.5  # of the best reward
STEPS = 30  # logged, before a run that doesn't move is said not to


def gap(run: Run) -> Finding | Unknown | None:
    """Training and held-out reward apart, by more than at the first evaluation."""
    for train, held_out in (("accuracy", "eval_accuracy"), ("reward", "eval_reward"), ("reward", "eval_accuracy")):
        (steps, values), (eval_steps, eval_values) = run.series(train), run.series(held_out)
        if steps and len(eval_steps) > 1:
            break
    else:
        return missing("eval_accuracy or eval_reward, at two steps,")
    first = next((r for r in run.records if r.step <= 1), None)
    start = values[0]
    if (first is not None and train == "reward") or (first is not None and np.isin(first.reward_B, (0.0, 1.0)).all()):
        start = float(np.nanmean(first.reward_B))
    begun = start - eval_values[0]
    changes = []
    for step, value in zip(eval_steps[1:], eval_values[1:], strict=True):
        last = max((step - before for before in eval_steps if before < step), default=step)
        near = [v for s, v in zip(steps, values, strict=True) if step - min(last, 50) < s <= step]
        changes.append((float(np.mean(near)) if near else values[-1]) - value - begun)
    epochs = max(run.series("epoch")[1], default=0.0)
    repeated = epochs > 1
    found = state(eval_steps[1:], changes, above(GAP[repeated]), least=min(2, len(changes)))
    if found is None:
        return None
    now = changes[-1] + begun
    evidence = (
        f"in training the {train} is {now:.2f} above the held-out one ({eval_values[-1]:.2f}), {changes[-1]:.2f} "
        "more than at the start; "
        + (f"the training problems were seen {epochs:.1f} times" if repeated else "on problems that are seen once")
    )
    remedy = (
        "More or other training problems, fewer epochs, beta > 0; save_strategy with metric_for_best_model "
        "keeps the best."
        if repeated
        else "Do both sets have the same difficulty and form, and the same reward? Look at held-out answers."
    )
    return Finding(ADVICE if repeated else WARNING, found.onset, evidence, found.confidence, remedy)


def fell(run: Run) -> Finding | Unknown | None:
    """Held-out accuracy, or the reward, far below its best."""
    name, steps, values = either(run, "eval_accuracy", "eval_reward")
    reward_steps, rewards = run.series("reward")
    if len(rewards) >= 10:
        smooth = np.convolve(rewards, np.ones(5) / 5, mode="valid")
        best = int(np.argmax(smooth))
        low = min(rewards)
        if smooth[best] > low and smooth[-1] - low < (1 - COLLAPSE) * (smooth[best] - low) and smooth[best] > 0:
            drop = smooth[best] - smooth[-1]
            noise = float(np.std(np.diff(rewards))) / math.sqrt(2) / math.sqrt(5)
            if drop > 4 * math.sqrt(2) * noise and drop > FALLEN * abs(smooth[best]):
                around = reward_steps[best + 2]
                evidence = f"the reward has fallen from {smooth[best]:.3f} (about step {around}) to {smooth[-1]:.3f}"
                remedy = "A lower learning_rate, max_grad_norm, beta > 0; go on from an earlier checkpoint."
                return Finding(CRITICAL, reward_steps[best + 4], evidence, 0.95, remedy)
    if len(values) < 2:
        return missing(name) if len(rewards) < 10 else None
    best = int(np.argmax(values))
    if values[best] - values[-1] <= FALLEN:
        return None
    evidence = f"{name} has fallen from its best, {values[best]:.3f} at step {steps[best]}, to {values[-1]:.3f}"
    remedy = "load_best_model_at_end with metric_for_best_model; a lower learning_rate; fewer epochs."
    return Finding(WARNING, steps[min(best + 1, len(steps) - 1)], evidence, 0.8, remedy)


def no_progress(run: Run) -> Finding | Unknown | None:
    steps, values = run.series("reward")
    if len(values) < STEPS:
        return Unknown(f"fewer than {STEPS} logged rewards")
    third = len(values) // 3
    before, after = np.array(values[:third]), np.array(values[-third:])
    error = math.sqrt(before.var(ddof=1) / third + after.var(ddof=1) / third)
    change = float(after.mean() - before.mean())
    spread = max(values) - min(values)
    if spread == 0 or abs(change) > error or after.mean() > 0.95 * max(values):
        return None
    evidence = f"the reward of the last third, {after.mean():.3f}, is that of the first ({change:+.3f} +- {error:.3f})"
    remedy = "A higher learning_rate (several times), or more steps; is grad_norm above 0?"
    return Finding(ADVICE, steps[0], evidence, 0.7, remedy)


def not_finite(run: Run) -> Finding | Unknown | None:
    odd = [
        (int(entry["step"]), name)
        for entry in run.logs
        for name, value in entry.items()
        if name in ("loss", "grad_norm", "reward", "kl") and isinstance(value, float) and not math.isfinite(value)
    ]
    if not odd:
        return None if run.logs else missing("anything")
    step, name = odd[0]
    evidence = f"{name} is NaN or infinite, first at step {step}, {len(odd)} times in all"
    remedy = (
        "Go on from a checkpoint before it with a lower learning_rate; bf16 in place of fp16; look at the "
        "rewards of that step."
    )
    return Finding(CRITICAL, step, evidence, 0.99, remedy)
