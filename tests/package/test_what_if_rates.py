"""Best learning rates over ``std``'s, pooled over a run's steps."""

import numpy as np
import pytest

from trl_ext.report.what_if_table import pooled_rates


def tables(*steps):
    """A table for each step, of (progress, squared length) by method."""
    rows = [{name: {"progress": p, "square": s} for name, (p, s) in step.items()} for step in steps]
    return [{"rows": one} for one in rows]


def test_a_rate_is_the_ratio_of_pooled_progress_over_squared_length():
    found = pooled_rates(
        tables(
            {"std": (2.0, 4.0), "mean": (1.0, 1.0)},
            {"std": (1.0, 1.0), "mean": (0.5, 0.25)},
            {"std": (3.0, 1.0), "mean": (1.5, 0.25)},
            {"std": (3.0, 9.0)},
        )
    )
    assert found["std"].value == found["std"].low == found["std"].high == 1.0
    # mean's steps are half as long, and gain half as much
    assert found["mean"].value == pytest.approx((3.0 / 1.5) / (6.0 / 6.0))
    assert found["mean"].low == pytest.approx(2.0) and found["mean"].high == pytest.approx(2.0)


def test_the_interval_is_over_steps_and_holds_the_truth():
    """Progress with noise, 200 runs of 30 steps: a rate of 0.5 is in 90 to 98 % of the intervals."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        noise = generator.normal(0, 0.5, (30, 2))
        steps = [{"std": (1 + a, 2.0), "max_rl": (1 + b, 4.0)} for a, b in noise]
        rate = pooled_rates(tables(*steps))["max_rl"]
        held += rate.low <= 0.5 <= rate.high
    assert 0.90 <= held / 200 <= 0.98


def test_no_rate_where_nothing_is_known_to_be_gained():
    scattered = [{"std": (1.0, 1.0), "mean": (x, 1.0)} for x in (3.0, -2.0, 1.0, -1.0)]
    assert set(pooled_rates(tables(*scattered))) == {"std"}
    without_std = [{"mean": (1.0, 1.0)}] * 5
    assert pooled_rates(tables(*without_std)) == {}
    two = [{"std": (1.0, 1.0), "mean": (1.0, 1.0)}] * 2
    assert pooled_rates(tables(*two)) == {}
    losing = [{"std": (-1.0, 1.0), "mean": (1.0, 1.0)}] * 5
    assert pooled_rates(tables(*losing)) == {}


def test_steps_of_earlier_versions_have_no_progress():
    old = [{"rows": {name: {"cos": 1.0, "factor": 1.0} for name in ("std", "mean")}}] * 5
    assert pooled_rates(old) == {}
