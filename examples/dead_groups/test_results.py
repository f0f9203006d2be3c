"""The committed results: what the pages, the verdict and the report say of them."""

import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from examples.dead_groups.costs import PRICES
from examples.dead_groups.results import (
    Difference,
    compared,
    difference,
    difference_table,
    holm,
    prices,
    rates,
    read,
    verdict_table,
    work_table,
)
from trl_ext.report.dead_groups import MEASURED
from trl_ext.report.next_experiment import NONE

ROWS = read()
PAGE = (Path(__file__).parent / "dead_groups.md").read_text()
DOCS = (Path(__file__).parents[2] / "docs" / "dead-groups.md").read_text()


def test_twelve_fresh_seeds_were_compared():
    runs = compared(ROWS, "confirm")
    assert {pair: len(of) for pair, of in runs.items()} == {
        (setting, arm): 12 for setting in ("wide", "wide_flips") for arm in ("std", "choose", "none")
    }
    assert {row["seed"] for of in runs.values() for row in of} == set(range(20, 32))


def test_the_pages_have_the_tables():
    for table in (difference_table(ROWS, "screen"), work_table(ROWS, "screen"), work_table(ROWS, "confirm")):
        assert all(line in PAGE for line in table.splitlines()), table
    for line in [*difference_table(ROWS, "confirm").splitlines()[2:]]:
        assert line.rstrip(" |") in PAGE, line
    for line in verdict_table(ROWS).splitlines()[2:]:
        setting, arm, less, verdict = (cell.strip(" `") for cell in line.strip("|").split("|"))
        row = next(
            one
            for one in PAGE.splitlines()
            if one.startswith(f"| `{setting}` | `{arm}` | +0") or one.startswith(f"| `{setting}` | `{arm}` | -0")
        )
        assert less in row and row.strip("| *").endswith(verdict)
        assert less in DOCS and verdict in DOCS
    assert all(line in PAGE for line in prices(ROWS).splitlines())


@pytest.mark.parametrize(
    ("remedy", "part", "arm"),
    zip(MEASURED, ("confirm", "confirm", "screen"), ("none", "choose", "resample"), strict=True),
)
def test_the_verdict_says_what_was_measured(remedy, part, arm):
    runs = compared(ROWS, part)
    differences = {price: difference(runs["wide", arm], runs["wide", "std"], f"at_{price:g}") for price in PRICES}
    for price, one in differences.items():
        np.testing.assert_allclose(remedy.by_price[price], (one.mean, *one.interval()), atol=5.1e-4)
    if part == "confirm":
        assert f"| `wide` | `{arm}` | {differences[3.0]} | {remedy.verdict} |" in verdict_table(ROWS)
    if arm == "none":
        assert NONE.startswith(f"over std {differences[3.0]}")


def test_a_rate_is_the_sweeps_best():
    for (setting, arm), rate in rates(ROWS).items():
        swept = [row for row in ROWS if (row["part"], row["setting"], row["arm"]) == ("sweep", setting, arm)]
        best = max(
            {row["learning_rate"] for row in swept},
            key=lambda one: sum(row["mean"] for row in swept if row["learning_rate"] == one),
        )
        assert rate == best
        assert {row["seed"] for row in swept} == {100, 101}


def test_a_difference_by_hand():
    std = [{"seed": seed, "at_3": 0.5} for seed in range(4)]
    arm = [
        {"seed": seed, "at_3": 0.5 + gain} for seed, gain in zip((3, 2, 1, 0), (0.01, 0.02, 0.03, 0.04), strict=True)
    ]
    found = difference(arm, std, "at_3")
    error = 1.4 * statistics.stdev([0.01, 0.02, 0.03, 0.04]) / 2
    assert (found.mean, found.error, found.seeds) == pytest.approx((0.025, error, 4))
    assert found.interval()[0] == pytest.approx(0.025 - 3.182 * error, abs=1e-5)
    assert found.p == pytest.approx(2 * t.sf(0.025 / error, 3))


def test_holm_by_hand():
    """Two-sided levels of 0.05 / 3, 0.05 / 2, 0.05: the second fails, so the third isn't significant either."""
    found = holm(
        {
            ("a", "x"): Difference(0.05, 0.01, 12),
            ("b", "x"): Difference(0.024, 0.01, 12),
            ("c", "x"): Difference(-0.0226, 0.01, 12),
            ("d", "x"): Difference(0.001, 0.003, 12),
        }
    )
    assert found == {("a", "x"): "better", ("b", "x"): "not worse", ("c", "x"): "unknown", ("d", "x"): "not worse"}
    worse = holm({("a", "x"): Difference(-0.05, 0.01, 12), ("b", "x"): Difference(-0.03, 0.01, 12)})
    assert set(worse.values()) == {"worse"}
