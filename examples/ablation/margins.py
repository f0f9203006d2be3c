"""How far healthy runs stay below the signatures' thresholds, and what a threshold chosen on the other seeds would do.

Present thresholds were fixed beforehand, so that counting their alarms needs no cross-validation. A threshold chosen on
healthy runs does: for each seed left out it is the smallest one without an alarm on the others, and at least the
present one. Only the largest of n seeds can be above all others, so that at most 1 in n raises an alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from trl_ext.report import evidence
from trl_ext.report.read_run import Run
from trl_ext.report.signatures import gradients, learning, steps

Badness = Callable[[Run], float]  # at the threshold 1


def highest_state(values: Sequence[float]) -> float:
    """The highest border at which ``evidence.state`` would find a state up to the end."""
    highest = -math.inf
    for length in range(evidence.LEAST, len(values) + 1):
        count = max(evidence.LEAST, math.ceil(evidence.MOSTLY * length))
        highest = max(highest, float(np.partition(values[-length:], -count)[-count]))
    return highest


def lasting(name: str, border: float, width: int = 1) -> Badness:
    """Of a metric that is bad above ``border``; ``width``: over means of so many."""
    return lambda run: highest_state(evidence.trailing(*run.series(name), width)[1]) / border


def few_live(run: Run) -> float:
    return highest_state([3 / max(count, 0.5) for count in run.series("interference/live_prompts")[1]])


def entropy(run: Run) -> list[float]:
    return run.series("entropy")[1] or run.series("entropy_live")[1]


def collapse(run: Run) -> float:
    values = entropy(run)
    return highest_state([min(0.1 * evidence.ends(values)[0], 0.02) / max(nats, 1e-9) for nats in values])


def rise(run: Run) -> float:
    values = entropy(run)
    return highest_state([nats / max(2 * values[0], values[0] + 0.5) for nats in values])


def denominators(run: Run) -> float:
    least, mean = (run.series(f"normalization/scale_{kind}")[1] for kind in ("min", "mean"))
    return highest_state([steps.TINY * b / max(a, 1e-9) for a, b in zip(least, mean, strict=True)])


def spikes(run: Run) -> float:
    """The largest gradient norm over the median of the 50 before it."""
    values = run.series("grad_norm")[1]
    ratios = [
        value / max(float(np.median(values[max(0, i - 50) : i])), 1e-9) for i, value in enumerate(values) if i > 4
    ]
    return max(ratios, default=0.0) / steps.SPIKE


def advantages(run: Run) -> float:
    if not run.series("normalization/scale_mean")[0]:
        return -math.inf
    return sorted(run.series("normalization/advantage_max")[1])[-steps.SPIKES] / steps.HUGE


def fall(run: Run) -> float:
    return evidence.largest_fall(run.series("reward")[1])[2] / learning.DEVIATIONS


def largest_shares(run: Run) -> float:
    shares = []
    for record in run.records:
        square = np.diag(record.gram_PP)
        if np.count_nonzero(square) >= gradients.PROMPTS:
            shares.append(float(square.max() / square.sum()) / gradients.DOMINATED)
    return highest_state(shares)


MARGINS: dict[str, Badness] = {
    **{f"all_{kind}": lasting(f"normalization/all_{kind}_frac", 0.95, 2) for kind in ("wrong", "right")},
    "mostly_dead": lasting("normalization/zero_variance_frac", 0.95, 2),
    "few_live_prompts": few_live,
    "fell": fall,
    "length_limit": lasting("completions/clipped_ratio", 0.5),
    "repetition": lasting("completions/repetition", 0.5),
    "entropy_collapse": collapse,
    "entropy_rise": rise,
    "tiny_denominators": denominators,
    "coefficient_spikes": advantages,
    "gradient_spikes": spikes,
    "clip_share": lasting("clip_ratio/region_mean", 0.2),
    "dominated": largest_shares,
}


def left_out(by_seed: dict[str, float]) -> tuple[int, int]:
    """(seeds with an alarm at the present threshold, seeds with one at the threshold that the other seeds choose)."""
    values = list(by_seed.values())
    chosen = [max([1.0, *values[:i], *values[i + 1 :]]) for i in range(len(values))]
    return sum(value > 1 for value in values), sum(a > b for a, b in zip(values, chosen, strict=True))
