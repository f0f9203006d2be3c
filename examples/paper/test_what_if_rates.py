"""The page on what-if's rates is what its CSV says; ranges by hand; the script runs."""

import math
import statistics
from pathlib import Path

import pytest

from examples.paper import what_if_rates
from examples.paper.what_if_rates import MEASURED, SETTINGS, arithmetic_range, interval, median_rate, rates, table

EXAMPLES = Path(__file__).parents[1]
PAGE = (EXAMPLES / "paper" / "what_if_rates.md").read_text()
ROWS = what_if_rates.read_rows()


def of(name):
    return [row for row in ROWS if row["setting"] == name]


def test_the_page_has_the_tables_of_the_numbers():
    for name in SETTINGS:
        assert "\n".join(table(ROWS, name)) in PAGE


def test_the_figures_that_the_page_states():
    errors = what_if_rates.log_errors(ROWS)
    for methods, stated in (("mean max_rl batch_std none", (0.07, 0.20)), ("max_rl batch_std none", (0.06, 0.27))):
        chosen = [pair for (_, method), pair in errors.items() if method in methods.split()]
        found = tuple(round(statistics.fmean(abs(pair[i]) for pair in chosen), 2) for i in (0, 1))
        assert found == stated
    assert "0.07 for the pooled rate, 0.20 for" in PAGE and "is narrow, 0.06 and 0.27" in PAGE
    for (name, method), (_, low, high) in MEASURED.items():
        assert low <= rates(of(name))[method].value <= high
        assert (low <= median_rate(of(name), method) <= high) == (method != "max_rl")
    runs = {name: what_if_rates.rates_of_runs(of(name)) for name in SETTINGS}
    assert [sum(map(bool, runs[name])) for name in SETTINGS] == [3, 2]
    by_run = {name: ", ".join(f"{run['max_rl'].value:.2f}" for run in runs[name] if run) for name in SETTINGS}
    assert f"{by_run['mixture']} on the mixture; {by_run['arithmetic']} on arithmetic" in " ".join(PAGE.split())
    for name in SETTINGS:
        assert rates(of(name))["loo"].value == pytest.approx(7 / 8 * rates(of(name))["mean"].value, rel=1e-4)


def test_measured_ratios_are_those_of_their_pages():
    files = ("paper/README.md", "ablation/README.md", "ablation/several_tasks.md")
    pages = "".join((EXAMPLES / file).read_text() for file in files).replace("**", "")
    assert all(interval(*one) in pages for one in MEASURED.values())


def test_arithmetic_ranges_by_hand():
    """Of 8 rewards with k of 1 the std is sqrt(k (8 - k) / 56): 0.354 to 0.535."""
    least, most = math.sqrt(7 / 56), math.sqrt(16 / 56)
    assert arithmetic_range("mean", 8) == pytest.approx((1 / most, 1 / least))
    assert arithmetic_range("loo", 8) == pytest.approx((7 / 8 / most, 7 / 8 / least))
    assert arithmetic_range("power", 8) == pytest.approx((most**-0.5, least**-0.5))
    assert arithmetic_range("max_rl", 8) == pytest.approx((1 / 8 / least, 7 / 8 / least))
    # pass rates mixed at will: sum p a / sum s a^2 with a = 1 / ratio, over the same without a
    assert (least / most**2, most / least**2) == pytest.approx((1.24, 4.28), abs=0.005)
    assert arithmetic_range("batch_std", 8) is None and arithmetic_range("none", 8) is None


def test_rates_are_pooled_over_the_steps_of_all_runs():
    numbers = [("std", 2.0, 4.0, 1.0), ("mean", 1.0, 1.0, 0.5)]
    rows = [
        {
            "setting": "x",
            "seed": str(seed),
            "step": str(step),
            "method": method,
            "progress": p,
            "square": s,
            "factor": f,
        }
        for seed in (0, 1)
        for step in (1, 3, 5)
        for method, p, s, f in numbers
    ]
    assert rates(rows)["mean"].value == pytest.approx(2.0)  # (1 / 1) / (2 / 4)
    assert median_rate(rows, "mean") == 2.0
    assert [one["mean"].value for one in what_if_rates.rates_of_runs(rows)] == pytest.approx([2.0, 2.0])


@pytest.mark.nightly
def test_the_script_as_users_run_it(launch, mixed_policy, tmp_path):
    file = tmp_path / "rates.csv"
    options = f"--settings mixture --seeds 42 --steps 4 --every 2 --output {file}".split()
    done = launch("paper/what_if_rates.py", *options)
    assert done.returncode == 0 and "mixture, seed 42: done" in done.stdout, done.stderr[-3000:]
    rows = what_if_rates.read_rows(file)
    assert {row["method"] for row in rows} == set(what_if_rates.METHODS)
    assert "\n".join(table(rows, "mixture")) in done.stdout
    again = launch("paper/what_if_rates.py", *options)
    assert again.returncode == 0 and "done" not in again.stdout
