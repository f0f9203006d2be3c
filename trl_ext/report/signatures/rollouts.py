"""Signatures of rollouts: groups that teach nothing, and answers with their length and entropy."""

from __future__ import annotations

import math

from trl_ext.report.dead_groups import known_remedy
from trl_ext.report.evidence import above, ends, state, trailing
from trl_ext.report.read_run import Run

from .finding import (
    ADVICE,
    CRITICAL,
    WARNING,
    Evidence,
    Finding,
    Found,
    Levels,
    Signature,
    Unknown,
    either,
    lasting,
    missing,
    too_few,
)

HEALTHY_LIVE = 0.2  # share of groups with different rewards, the floor of a healthy run
GROUPS = 30  # that a share is of: as many dead ones have probability 0.001 where a fifth is live
DEAD = {CRITICAL: above(0.95)}  # share of groups; at four fifths well-trained runs have it too (false_alarms.py)
CUT = {CRITICAL: above(0.95), WARNING: above(0.5)}  # share of answers at the length limit
SAME_LENGTH = 0.9  # of the longest answer: all that are cut off have it
LONGER, SHORTER, TOKENS = 2.0, 0.5, 8  # times the length at the start, and tokens at least
LEAST = 5  # log lines


def _dead(run: Run, name: str, levels: Levels, evidence: Evidence, remedy: str) -> Found:
    """A share of the groups, over as many logged numbers as have ``GROUPS`` of them: of one prompt it is 0 or 1."""
    series = run.series(name)
    batch, generations = (run.config.get(key) for key in ("generation_batch_size", "num_generations"))
    if isinstance(batch, int) and isinstance(generations, int) and 0 < generations <= batch:
        every = run.config.get("logging_steps")
        groups = batch // generations * max(1, int(every) if isinstance(every, int | float) else 1)  # of a logged mean
        series = trailing(*series, math.ceil(GROUPS / groups))
    if not series[0]:
        return Unknown(f"fewer than {GROUPS} groups in the log") if run.series(name)[0] else missing(name)
    return lasting(series, levels, evidence, remedy)


def all_dead(title: str, kind: str, remedy: str) -> Signature:
    """The signature of groups whose answers are all of one ``kind``, "right" or "wrong"."""

    def evidence(mean: float) -> str:
        reward = "a high reward" if kind == "right" else "a low reward"
        return f"in {mean:.0%} of the groups all answers got {reward}: no gradient is left"

    def find(run: Run) -> Found:
        return _dead(run, f"normalization/all_{kind}_frac", {CRITICAL: DEAD[CRITICAL]}, evidence, remedy)

    return Signature(title, find, explains=("mostly_dead", "few_live_prompts", "no_progress"))


def mostly_dead(run: Run) -> Found:
    names = "normalization/zero_variance_frac", "frac_reward_zero_std"  # the second: TRL's own trainer
    name = either(run, *names)
    if not run.series(name)[0]:
        return Unknown(f"neither {' nor '.join(names)} is in the log")
    right, wrong = (run.last(f"normalization/all_{kind}_frac") for kind in ("right", "wrong"))
    which = f" (at the end {right:.0%} all right, {wrong:.0%} all wrong)" if None not in (right, wrong) else ""

    def evidence(mean: float) -> str:
        return f"{mean:.0%} of the groups have answers of equal reward and teach nothing{which}"

    return _dead(run, name, DEAD, evidence, known_remedy(run))


def length_limit(run: Run) -> Found:
    name = "completions/clipped_ratio"
    series = run.series(name)
    if not series[0]:
        return missing(name)
    mean, longest = run.last("completions/mean_length"), run.last("completions/max_length")
    if mean is not None and longest is not None and mean < SAME_LENGTH * longest and CUT[CRITICAL](series[1][-1]):
        return None  # answers of many lengths end by themselves, without an end token
    remedy = (
        "A larger max_completion_length, mask_truncated_completions=True, or shorter answers asked for; does the model "
        "know its end token?"
    )
    return lasting(series, CUT, lambda mean: f"{mean:.0%} of the answers are cut off at max_completion_length", remedy)


def entropy_collapse(run: Run) -> Found:
    """Below a tenth of the entropy at the start, and 0.02 nats."""
    name = either(run, "entropy", "entropy_live")
    steps, values = run.series(name)
    if not steps:
        return missing(name)
    start = ends(values)[0]

    def evidence(mean: float) -> str:
        return f"{name} went from {start:.3f} to {mean:.4f} nats a token: all answers are the same"

    remedy = "A higher temperature, an entropy bonus (entropy_coef), epsilon_high = 0.28, a lower learning_rate."
    return lasting((steps, values), {WARNING: lambda nats: nats < min(0.1 * start, 0.02)}, evidence, remedy)


def entropy_rise(run: Run) -> Found:
    """Above twice the first entropy, and 0.5 nats more."""
    name = either(run, "entropy", "entropy_live")
    steps, values = run.series(name)
    if not steps:
        return missing(name)
    start = values[0]

    def evidence(mean: float) -> str:
        return f"{name} went from {start:.2f} to {mean:.2f} nats a token: answers become random"

    remedy = "A lower learning_rate, max_grad_norm, beta > 0; rewards that are drawn at random do this too."
    return lasting((steps, values), {WARNING: lambda nats: nats > max(2 * start, start + 0.5)}, evidence, remedy)


def length_hacking(run: Run) -> Found:
    """Answers grow or shrink by much and the reward rises, but the held-out score doesn't."""
    steps, values = run.series("completions/mean_length")
    rewards = run.series("reward")[1]
    held_out = run.series(either(run, "eval_accuracy", "eval_reward"))[1]
    if min(len(values), len(rewards)) < LEAST:
        return too_few(run, LEAST, "completions/mean_length", "reward")
    start = ends(values)[0]
    longer = state(steps, values, lambda length: length > max(LONGER * start, start + TOKENS))
    found = longer or state(steps, values, lambda length: length < min(SHORTER * start, start - TOKENS))
    before, after = ends(rewards)
    if found is None or after <= before + 0.01 * max(abs(before), 0.1):
        return None
    known = len(held_out) > 1
    if known and held_out[-1] > held_out[0] + 0.02:
        return None  # what is learned helps
    seen = f"the held-out score does not ({held_out[0]:.2f} to {held_out[-1]:.2f})" if known else "nothing is held out"
    evidence = (
        f"answers went from {start:.0f} to {found.mean:.0f} tokens while the reward rose from {before:.2f} "
        f"to {after:.2f}; {seen}"
    )
    remedy = (
        "Does the reward pay for length? Then change it, or add a penalty (get_soft_overlong_punishment). If not, the "
        "loss may: loss_type='dr_grpo' or 'dapo'."
    )
    return Finding(WARNING if known else ADVICE, found.onset, evidence, found.confidence, remedy)
