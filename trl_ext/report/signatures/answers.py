"""Of answers: their length, their words, their entropy."""

from __future__ import annotations

from trl_ext.report.evidence import State, ends, state
from trl_ext.report.read_run import Run

from .finding import ADVICE, CRITICAL, WARNING, Finding, Unknown, either, graded, lasting, missing, too_few

CUT, ALL_CUT = 0.5, 0.95  # of answers, at the length limit
SAME_LENGTH = 0.9  # of the longest answer: all that are cut off have it
REPEATED = 0.5  # of an answer's runs of four tokens
COLLAPSED = (0.1, 0.02)  # of the entropy at the start, and nats
RISEN = (2.0, 0.5)
LEAST = 5  # log lines
LONGER, SHORTER, TOKENS = 2.0, 0.5, 8  # times the length at the start, and tokens at least


def length_limit(run: Run) -> Finding | Unknown | None:
    name = "completions/clipped_ratio"
    steps, values = run.series(name)
    if not steps:
        return missing(name)
    mean, longest = run.last("completions/mean_length"), run.last("completions/max_length")
    if mean is not None and longest is not None and mean < SAME_LENGTH * longest and values[-1] >= ALL_CUT:
        return None  # of many lengths: they end by themselves, without an end token
    level, found = graded(steps, values, {CRITICAL: ALL_CUT, WARNING: CUT})
    if level is None or found is None:
        return None
    evidence = f"{found.mean:.0%} of the answers are cut off at max_completion_length"
    remedy = (
        "A larger max_completion_length, mask_truncated_completions=True, or shorter answers asked for; does the model "
        "know its end token?"
    )
    return Finding(level, found.onset, evidence, found.confidence, remedy)


def repetition(run: Run) -> Finding | Unknown | None:
    def told(found: State) -> str:
        return f"{found.mean:.0%} of the answers' runs of four tokens occurred before in the same answer"

    remedy = "repetition_penalty, a lower temperature; a lower learning_rate or beta > 0 where it began while training."
    return lasting(run, "completions/repetition", lambda share: share > REPEATED, WARNING, told, remedy)


def entropy_collapse(run: Run) -> Finding | Unknown | None:
    name, _, values = either(run, "entropy", "entropy_live")
    start = ends(values)[0] if values else 0.0

    def collapsed(nats: float) -> bool:
        return nats < COLLAPSED[0] * start and nats < COLLAPSED[1]

    def told(found: State) -> str:
        return f"{name} went from {start:.3f} to {found.mean:.4f} nats a token: all answers are the same"

    remedy = "A higher temperature, an entropy bonus (entropy_coef), epsilon_high = 0.28, a lower learning_rate."
    return lasting(run, name, collapsed, WARNING, told, remedy, low=True)


def entropy_rise(run: Run) -> Finding | Unknown | None:
    name, _, values = either(run, "entropy", "entropy_live")
    start = values[0] if values else 0.0

    def risen(nats: float) -> bool:
        return nats > RISEN[0] * start and nats > start + RISEN[1]

    def told(found: State) -> str:
        return f"{name} went from {start:.2f} to {found.mean:.2f} nats a token: answers become random"

    remedy = "A lower learning_rate, max_grad_norm, beta > 0; rewards that are drawn at random do this too."
    return lasting(run, name, risen, WARNING, told, remedy)


def length_hacking(run: Run) -> Finding | Unknown | None:
    """Answers grow (or shrink) by much, the reward rises, and held-out problems say nothing of it."""
    steps, values = run.series("completions/mean_length")
    rewards = run.series("reward")[1]
    held_out = either(run, "eval_accuracy", "eval_reward")[2]
    if min(len(values), len(rewards)) < LEAST:
        return too_few(run, LEAST, "completions/mean_length", "reward")
    start = ends(values)[0]
    longer = state(steps, values, lambda length: length > LONGER * start and length > start + TOKENS)
    shorter = state(steps, values, lambda length: length < SHORTER * start and length < start - TOKENS, low=True)
    found = longer or shorter
    before, after = ends(rewards)
    if found is None or after <= before + 0.01 * max(abs(before), 0.1):
        return None
    if len(held_out) > 1 and held_out[-1] > held_out[0] + 0.02:
        return None  # what is learned helps
    known = len(held_out) > 1
    seen = f"the held-out score does not ({held_out[0]:.2f} to {held_out[-1]:.2f})" if known else "nothing is held out"
    evidence = (
        f"answers went from {start:.0f} to {found.mean:.0f} tokens while the reward rose from {before:.2f} "
        f"to {after:.2f}; {seen}"
    )
    remedy = (
        "Does the reward pay for length? loss_type='dr_grpo' or 'dapo', a penalty on length "
        "(get_soft_overlong_punishment), a held-out evaluation."
    )
    return Finding(WARNING if known else ADVICE, found.onset, evidence, found.confidence, remedy)
