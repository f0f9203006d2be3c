"""Of groups: those that teach nothing, and why."""

from __future__ import annotations

import math

from trl_ext.report.evidence import State, above, state, trailing
from trl_ext.report.read_run import Run

from .finding import ADVICE, CRITICAL, WARNING, Finding, Unknown, either, graded, lasting, missing

HEALTHY_LIVE = 0.2  # share of groups with different rewards, the floor of a healthy run
GROUPS = 30  # that a share is of: as many dead ones have probability 0.001 where a fifth is live
ALL_DEAD, MOSTLY_DEAD, SOME_DEAD = 0.95, 1 - HEALTHY_LIVE, 0.5  # of groups
UNSCORED = 0.1  # of answers


def of_groups(run: Run, name: str) -> tuple[list[int], list[float]]:
    """A share of the groups, over as many logged numbers as have ``GROUPS`` of them: of one prompt it is 0 or 1."""
    steps, values = run.series(name)
    batch, generations = (run.config.get(key) for key in ("generation_batch_size", "num_generations"))
    if not isinstance(batch, int) or not isinstance(generations, int) or not 0 < generations <= batch:
        return steps, values
    every = run.config.get("logging_steps")
    groups = batch // generations * max(1, int(every) if isinstance(every, int | float) else 1)  # of a logged mean
    return trailing(steps, values, math.ceil(GROUPS / groups))


def _too_few(run: Run, name: str) -> Unknown:
    return Unknown(f"fewer than {GROUPS} groups in the log") if run.series(name)[0] else missing(name)


def _all_dead(run: Run, name: str, kind: str, remedy: str) -> Finding | Unknown | None:
    steps, values = of_groups(run, name)
    if not steps:
        return _too_few(run, name)
    found = state(steps, values, above(ALL_DEAD))
    if found is None:
        return None
    evidence = f"{found.mean:.0%} of the groups have answers that are all {kind}: no gradient is left"
    return Finding(CRITICAL, found.onset, evidence, found.confidence, remedy)


def all_wrong(run: Run) -> Finding | Unknown | None:
    remedy = (
        "Too hard, or misjudged: look at some answers and their rewards (log_completions=True); then easier problems, "
        "rewards for parts of an answer, a better start (supervised), or more answers (num_generations)."
    )
    return _all_dead(run, "normalization/all_wrong_frac", "wrong", remedy)


def all_right(run: Run) -> Finding | Unknown | None:
    remedy = (
        "Too easy by now: stop here, or go on with harder problems; resample_zero_variance=True finds what is left."
    )
    return _all_dead(run, "normalization/all_right_frac", "right", remedy)


def mostly_dead(run: Run) -> Finding | Unknown | None:
    name = either(run, "normalization/zero_variance_frac", "frac_reward_zero_std")[0]  # of TRL's own trainer
    steps, values = of_groups(run, name)
    if not steps:
        return _too_few(run, name)
    level, found = graded(steps, values, {CRITICAL: ALL_DEAD, WARNING: MOSTLY_DEAD, ADVICE: SOME_DEAD})
    if level is None or found is None:
        return None
    right, wrong = (run.last(f"normalization/all_{kind}_frac") for kind in ("right", "wrong"))
    which = f" (at the end {right:.0%} all right, {wrong:.0%} all wrong)" if None not in (right, wrong) else ""
    evidence = f"{found.mean:.0%} of the groups have answers of equal reward and teach nothing{which}"
    remedy = "resample_zero_variance=True draws other prompts for them; or problems of another difficulty."
    return Finding(level, found.onset, evidence, found.confidence, remedy)


def few_live_prompts(run: Run) -> Finding | Unknown | None:
    remedy = (
        "More prompts in a step (per_device_train_batch_size, gradient_accumulation_steps), or "
        "resample_zero_variance=True."
    )

    def told(found: State) -> str:
        return f"on average {found.mean:.1f} prompts of a logged step have a gradient: no phase can be told"

    return lasting(run, "interference/live_prompts", lambda count: count < 3, ADVICE, told, remedy, low=True)


def unscored(run: Run) -> Finding | Unknown | None:
    def told(found: State) -> str:
        return f"{found.mean:.0%} of the answers get no reward at all (None)"

    remedy = "See which reward function returns None, and why."
    return lasting(run, "normalization/unscorable_frac", lambda share: share > UNSCORED, WARNING, told, remedy)
