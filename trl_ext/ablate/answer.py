"""What a study found, in sentences: one for each question a user has, and what it didn't test."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .compare import NEVER, PLACEBO, RESOLUTION, Difference, Summary
from .plan import Plan


def sentence(one: Difference, first: str, seeds: int) -> str:
    """Says whether a variant ends above or below the first one, with its interval."""
    interval = f"[{one.low:+.3f}, {one.high:+.3f}]"
    if math.isinf(one.low):
        return f"{one.name} and {first}: too few seeds to tell ({counted(seeds)}; {one.difference:+.3f})."
    if one.told:
        where = "above" if one.difference > 0 else "below"
        size, ends = abs(one.difference), sorted((abs(one.low), abs(one.high)))
        return f"{one.name} ends {size:.3f} [{ends[0]:.3f}, {ends[1]:.3f}] {where} {first}."
    text = f"{one.name} and {first} can't be told apart with {counted(seeds)}: {one.difference:+.3f} {interval}"
    if one.low > 0 or one.high < 0:
        text += " before Holm's correction, which takes it away"
    low, high = one.more_seeds or (0, 0)
    if low == NEVER:
        return f"{text}; more seeds wouldn't tell {RESOLUTION} without more --tuning-seeds for the learning rates."
    if high:
        return f"{text}; {between(low, high)} more would be needed to tell {RESOLUTION}."
    return f"{text}, and so any difference is below {max(abs(one.low), abs(one.high)):.3f}."


def between(low: int, high: int) -> str:
    """Formats a range of numbers of seeds."""
    top = "over 1000" if high > 1000 else str(high)
    return top if low == high or low > 1000 else f"between {low} and {top}"


def counted(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def answers(plan: Plan, summaries: Sequence[Summary], found: Sequence[Difference]) -> list[str]:
    """Returns a sentence for each compared variant, and one of the placebo."""
    first, seeds = summaries[0].name, len(summaries[0].final)
    lines = [sentence(one, first, seeds) for one in found if not one.name.endswith(PLACEBO)]
    for one in found:
        if one.name.endswith(PLACEBO):
            lines.append(placebo_sentence(one, summaries))
    return lines


def placebo_sentence(one: Difference, summaries: Sequence[Summary]) -> str:
    """Says what choosing the rate on other seeds changes: a difference must be larger than that to mean anything."""
    first = summaries[0]
    again = next(summary for summary in summaries if summary.name == one.name)
    rates = f"{first.choice.rate:g} and {again.choice.rate:g}"
    if first.choice.rate == again.choice.rate:
        return f"Placebo: {first.name} tuned on other seeds gets the same learning rate, {first.choice.rate:g}."
    return (
        f"Placebo: {first.name} tuned on other seeds gets another learning rate ({rates}), and ends "
        f"{one.difference:+.3f} from itself. That is what the choice of a rate alone makes."
    )


def not_tested(plan: Plan, summaries: Sequence[Summary], steps: int, metric: str) -> list[str]:
    """Returns what a reader might believe was tested and wasn't."""
    lines = [f"More than {steps} steps, another model, other data."]
    edges = [one.name for one in summaries if one.choice.at_edge]
    if edges:
        lines.append(f"Learning rates beyond the sweep's, where the best lies at its edge: {', '.join(edges)}.")
    if plan.rates == 1:
        lines.append("A learning rate of its own for each method.")
    if metric == "reward":
        lines.append("Held-out questions: the script evaluates none, so this is the reward in training.")
    lines += [f"Left out by the budget: {one}." for one in plan.dropped]
    if any(one.failed for one in summaries):
        names = ", ".join(f"{one.name} {one.failed}" for one in summaries if one.failed)
        lines.append(
            f"Failed or NaN runs ({names}) count as the lowest value of any run; a run's output.txt says why. "
            "Where the machine was to blame, delete the folder and repeat the command."
        )
    return lines
