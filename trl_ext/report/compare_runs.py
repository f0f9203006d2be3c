"""Compares two runs number by number, each difference with a 95 % interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .evidence import interval, sampling_error
from .read_run import Run

BLOCKS = 10  # of common steps; their means are nearly independent where steps aren't
# label -> metric, in the console's words
COMPARED = {
    "reward in training": "reward",
    "dead groups": "normalization/zero_variance_frac",
    "truncated answers": "completions/clipped_ratio",
    "answer length": "completions/mean_length",
    "entropy": "entropy",
    "entropy of live answers": "entropy_live",
    "gradient norm": "grad_norm",
    "seconds a step": "step_time",
}


@dataclass(frozen=True)
class Difference:
    """A number of two runs. ``told``: whether the interval of the second less the first excludes 0."""

    label: str
    first: float
    second: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        return self.low > 0 or self.high < 0


def compare_runs(first: Run, second: Run) -> list[Difference]:
    """The held-out scores at the last common step, then the means of both logs' common steps, where they are logged."""
    found = [_held_out(first, second)]
    found += [_mean_difference(label, name, first, second) for label, name in COMPARED.items()]
    return [one for one in found if one is not None]


def _held_out(first: Run, second: Run) -> Difference | None:
    a, b = (dict(zip(*run.series("eval_accuracy"), strict=True)) for run in (first, second))
    common = sorted(a.keys() & b.keys())
    if not common:
        return None
    step = common[-1]
    pair = a[step], b[step]
    errors = [sampling_error(run.evaluated_questions, pair) for run in (first, second)]
    if not all(errors):
        return None
    half, change = 1.96 * max(errors), pair[1] - pair[0]
    return Difference(f"held-out accuracy at step {step}", *pair, change - half, change + half)


def _mean_difference(label: str, name: str, first: Run, second: Run) -> Difference | None:
    a, b = (dict(zip(*run.series(name), strict=True)) for run in (first, second))
    common = sorted(a.keys() & b.keys())
    if len(common) < BLOCKS:
        return None
    pairs = np.array([(a[step], b[step]) for step in common])
    blocks = [float(np.mean(block[:, 1] - block[:, 0])) for block in np.array_split(pairs, BLOCKS)]
    _, low, high = interval(blocks, looks=len(COMPARED))
    return Difference(label, float(pairs[:, 0].mean()), float(pairs[:, 1].mean()), low, high)
