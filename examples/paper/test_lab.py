"""examples/paper/lab.py: its tables by hand, its choice of rates, and the command as users run it."""

import csv
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from examples.paper import lab, lab_cells, lab_results, log_linear
from examples.paper.log_linear import Policies, Runs, Setting, train
from trl_ext.ablate.page import write_csv


def test_tables_by_hand(tmp_path):
    row = {"part": "map", **dataclasses.asdict(Setting()), "target": 0.5, "edge_steps": False, "edge_area": True}
    mean = {
        "method": "mean",
        "steps": "8 16 8 16",
        "area": "0.5 0.5 0.5 0.5",
        "flow_time": "8 8 inf 8",
        "rate_area": 2.0,
    }
    std = {"method": "std", "steps": "4 8 4 8", "area": "0.6 0.6 0.6 0.61", "flow_time": "3 3 3 3", "rate_area": 1.0}
    write_csv(tmp_path / "cells.csv", [row | mean, row | std])
    (cell,) = lab_cells.read_cells(tmp_path / "cells.csv")
    gain = cell.area_gain()
    assert gain.estimate == pytest.approx(0.1025) and gain.low > 0.09 and gain.high < 0.12
    assert cell.steps_ratio() == pytest.approx(math.log(0.5))
    assert math.isnan(cell.flow_ratio())  # three of four seeds: fewer than 80 %
    cell.rows["mean"]["flow_time"] = np.full(4, 8.0)
    assert cell.flow_ratio() == pytest.approx(0)
    assert lab_results.by_dial([cell])[2] == "| group | 8 | +0.102 (20%) | 1, 0, 1 |  |  |"
    cell.rows["std"]["edge_steps"] = np.ones(1)
    assert math.isnan(cell.steps_ratio())


def test_fits():
    x = np.linspace(-1, 0, 30)
    noise = 0.01 * np.sin(40 * x)
    exact = lab_results.fit(x, x + noise)
    assert exact.slope.estimate == pytest.approx(1, abs=0.02) and exact.slope.low < 1 < exact.slope.high
    assert exact.as_it_is > 0.99
    half = lab_results.fit(x, 0.5 * x + 1 + noise)
    assert [half.slope.estimate, half.intercept.estimate] == pytest.approx([0.5, 1], abs=0.02)
    assert half.explained > 0.99 and half.as_it_is < 0
    assert lab_results.fit(x[:5], x[:5]) is None


def committed(name):
    """Rows of a file of results/, numbers as numbers; an empty value is NaN."""
    with open(Path(lab.__file__).parent / "results" / name, newline="") as stream:
        texts = ("part", "method")
        return [{k: v if k in texts else float(v or "nan") for k, v in row.items()} for row in csv.DictReader(stream)]


MAP = [row for row in committed("lab.csv") if row["part"] == "map"]
README = (Path(lab.__file__).parent / "README.md").read_text()
PAGE = (Path(lab.__file__).parents[2] / "docs" / "which-normalisation.md").read_text().replace("**", "")


def mean_gain(rows, name="gain_std"):
    return np.mean([row[name] for row in rows])


def test_the_gain_of_std_by_answers_and_flips_is_what_the_page_says():
    """docs/which-normalisation.md: intervals 1.4 times as wide."""
    for group, name in ((4, "4"), (8, "8"), (32, "32"), (128, "128"), (0, "exact gradients")):
        texts = []
        for noise in (0, 0.1, 0.2):
            at = [row for row in MAP if (row["group"], row["noise"]) == (group, noise)]
            better = sum(row["gain_std"] - 1.4 * (row["gain_std"] - row["gain_low"]) > 0 for row in at)
            worse = sum(row["gain_std"] + 1.4 * (row["gain_high"] - row["gain_std"]) < 0 for row in at)
            assert len(at) == 45
            texts.append(f"{mean_gain(at):+.3f} ({better}, {worse})")
        assert f"| {name} | {' | '.join(texts)} |" in PAGE


LEVELS = {
    "group": {"exact gradients": 0, "G = 128": 128, "G = 32": 32, "G = 8": 8, "G = 4": 4},
    **{
        dial: {f"{name} {level:g}": level for level in levels}
        for dial, name, levels in (
            ("pass_rate", "pass rate", (0.5, 0.1, 0.03)),
            ("spread", "spread", (0, 1, 2)),
            ("overlap", "overlap", lab_results.OVERLAPS),
        )
    },
}


@pytest.mark.parametrize("dial", LEVELS)
def test_the_gain_of_std_by_each_dial_is_what_the_readme_says(dial):
    for name, level in LEVELS[dial].items():
        texts = []
        for flipped in (False, True):
            at = [row for row in MAP if row[dial] == level and bool(row["noise"]) == flipped]
            at = [row for row in at if row["group"] or dial == "group"]
            share = mean_gain(at) / (1 - mean_gain(at, "area_mean"))
            better, worse = sum(row["gain_low"] > 0 for row in at), sum(row["gain_high"] < 0 for row in at)
            texts += [f"{mean_gain(at):+.3f} ({100 * share:.0f} %)", f"{better}, {worse}, {len(at)}"]
        assert f"| {name} | {' | '.join(texts)} |".replace("(-0 %)", "(0 %)") in README


def test_what_the_gain_of_std_depends_on_is_what_the_readme_says():
    sampled = [row for row in MAP if row["group"]]
    right = [row for row in sampled if not row["noise"]]
    by_noise = [mean_gain([row for row in sampled if row["noise"] == noise]) for noise in (0, 0.1, 0.2)]
    assert [round(gain, 3) for gain in by_noise] == [0.019, 0.005, 0.003]
    low = [row for row in right if row["group"] == 32 and row["own_std_8_3_start"] < 0.9]
    gains = [f"{mean_gain([row for row in low if row['overlap'] == one]):.3f}" for one in lab_results.OVERLAPS]
    assert f"and G = 32, {', '.join(gains)} from 0 to 0.9" in plain(README)
    high = [row for row in right if row["group"] == 32 and row["own_std_8_3_start"] >= 0.9]
    assert f"{mean_gain(low):+.3f} against {mean_gain(high):+.3f} with 32 answers" in plain(PAGE)
    exact = [max(row["gain_std"] for row in MAP if not row["group"] and bool(row["noise"]) == f) for f in (False, True)]
    assert [round(gain, 2) for gain in exact] == [0.14, 0.03]


def test_what_explains_the_gain_of_std_is_what_the_pages_say():
    dials = ("overlap", "spread", "pass_rate", "noise")
    cells = [
        cell_of(row["gain_std"], group=int(row["group"]), **{dial: row[dial] for dial in dials})
        for row in MAP
        if row["group"]
    ]
    by_overlap, _, _, three, four = (float(line.split("|")[2]) for line in lab_results.explained(cells)[2:])
    assert f"explain R^2 {three} of the gain; with overlap {four}; overlap alone {by_overlap}" in plain(README)
    pages = f"R^2 {three} with those and their product, {four} with overlap too, {by_overlap} with overlap alone"
    assert pages in plain(PAGE)


OTHERS = committed("lab_methods.csv")
LABELS = {"power": "`power` 0.5", "rank": "`rank`: on binary rewards `loo`", "true_sigma": "the true sigma"}


def other(method, **wanted):
    return [row for row in OTHERS if row["method"] == method and all(row[dial] == at for dial, at in wanted.items())]


def signed(value):
    return f"{value:+.3f}".replace("-0.000", "0.000").replace("+0.000", "0.000")


@pytest.mark.parametrize("method", lab.METHODS["methods"][1:])
def test_other_methods_are_what_the_readme_says(method):
    for noise, flips in ((0, "none"), (0.1, "a tenth")):
        texts = []
        for group in (8, 32):
            at = other(method, group=group, noise=noise)
            gains = [row["less_mean"] for row in at]
            assert len(gains) == 6
            texts.append(", ".join(signed(gain) for gain in (min(gains), np.mean(gains), max(gains))))
            texts.append(f"{sum(r['less_mean_low'] > 0 for r in at)}, {sum(r['less_mean_high'] < 0 for r in at)}")
        assert f"| {LABELS.get(method, f'`{method}`')} | {flips} | {' | '.join(texts)} |" in README


def test_max_rl_is_what_the_pages_say():
    def span(digits, **wanted):
        gains = [row["less_mean"] for row in other("max_rl", pass_rate=0.1, **wanted)]
        return f"{min(gains):+.{digits}f} to {max(gains):+.{digits}f}"

    (right_8, right_32), (wrong_8, wrong_32) = (
        [span(2, overlap=0.5, noise=noise, group=group) for group in (8, 32)] for noise in (0, 0.1)
    )
    shared = f"right rewards {right_8} at G = 8 and {right_32} at G = 32; with a tenth of the rewards flipped"
    assert f"{shared} {wrong_8} and {wrong_32}" in plain(README)
    assert f"{right_8} above `mean` with 8 answers and {right_32} with 32" in plain(PAGE)
    assert f"{span(2, overlap=0.5, noise=0.1)} above it where they share" in plain(PAGE)
    assert span(2, overlap=0, noise=0.1) == "-0.08 to -0.06"
    for page, text in ((README, "right rewards it is"), (PAGE, "where they share nothing")):
        assert f"{text} {span(3, overlap=0, noise=0)}" in plain(page)
    assert max(abs(row["less_mean"]) for row in other("max_rl", pass_rate=0.5)) < 0.01


@pytest.mark.parametrize(("noise", "name"), [(0, "right rewards"), (0.1, "a tenth flipped")])
def test_max_rl_less_std_is_what_the_pages_say(noise, name):
    """Intervals 1.4 times as wide as the seeds make them."""
    at = other("max_rl", noise=noise)
    halves = [(row["less_std_high"] - row["less_std_low"]) / 2 for row in at]
    worst = min(row["less_std"] for row in at)
    mean = f"{mean_gain(at, 'less_std'):+.3f} +- {1.4 * math.hypot(*halves) / len(at):.3f}"
    assert f"{mean} with {name} (worst setting {worst:.3f})" in plain(README)
    assert f"{mean}, at worst {worst:.3f}" in plain(PAGE)


def test_the_true_sigma_and_loo_are_what_the_readme_says():
    shared = {"overlap": 0.5, "spread": 0, "pass_rate": 0.1, "noise": 0}
    (known, known_few), (std, std_few) = (
        [other(method, group=group, **shared)[0] for group in (32, 8)] for method in ("true_sigma", "std")
    )
    (exact,) = (row for row in MAP if not row["group"] and all(row[dial] == at for dial, at in shared.items()))
    many = f"gain {known['less_mean']:.3f} where `std` gains {std['less_mean']:.3f} (exact {exact['gain_std']:.3f})"
    few = f"gain {known_few['less_mean']:.3f} [{known_few['less_mean_low']:.3f}, {known_few['less_mean_high']:+.3f}]"
    assert f"{many}; with 8 they {few} where `std` gains {std_few['less_mean']:.3f}" in plain(README)
    alone = [row["less_mean"] for row in other("true_sigma", overlap=0, noise=0)]
    assert (round(min(alone), 3), round(max(alone), 2)) == (-0.035, -0.01)
    gains = [row["less_mean"] for row in other("loo")]
    by_group = [f"{mean_gain(other('loo', group=group), 'less_mean'):+.3f} at G = {group}" for group in (8, 32)]
    assert f"gains {min(gains):+.3f} to {max(gains):+.3f}, on average {' and '.join(by_group)}" in plain(README)
    better = [row["group"] for row in other("loo") if row["less_mean_low"] > 0]
    assert better == [32] * 3


def plain(page):
    """The page without line breaks."""
    return " ".join(page.split())


def cell_of(gain, *, rate=1.0, methods=("mean", "std"), **setting):
    """A cell whose methods gain 0, ``gain``, 2 ``gain``... over ``mean``, with a little noise between four seeds."""
    noise = np.array([0.0, 1e-4, -1e-4, 0.0])
    rows = {
        name: {
            "area": 0.5 + i * (gain + noise),
            "rate_area": rate ** (1 - i),
            "edge_steps": bool(i),
            "edge_area": False,
        }
        for i, name in enumerate(methods)
    }
    return lab_cells.Cell("map", Setting(**setting), rows)


def own_std_at_start(**setting):
    return lab_cells.own_std_at_start(Setting(**setting))


def test_the_groups_own_std_at_the_start():
    assert own_std_at_start(group=2, pass_rate=0.5) == pytest.approx(2 / 3)  # 1/2 where one is right: half of the time
    assert own_std_at_start(group=2, pass_rate=0.2, noise=0.1) == pytest.approx(8 / 3 * 0.26 * 0.74)
    assert own_std_at_start(group=0, pass_rate=0.2, noise=0.1) == pytest.approx(8 / 3 * math.sqrt(0.26 * 0.74))
    level = own_std_at_start(group=0, pass_rate=0.5)
    assert own_std_at_start(group=0, pass_rate=0.5, spread=2.0) < level == pytest.approx(4 / 3)
    setting = {"spread": 1.0, "pass_rate": 0.3, "noise": 0.1}
    runs = train(Policies(Setting(**setting), [0]), "mean", np.zeros((1, 300)), 0)
    assert 8 / 3 * runs.group_sigma.mean() == pytest.approx(own_std_at_start(**setting), abs=0.01)


def test_what_explains_the_gain():
    """A gain that is made of one of them is explained by it."""
    values = itertools.product((4, 8, 32), (0.05, 0.1, 0.3, 0.5), (0.0, 0.5))
    settings = [{"group": group, "pass_rate": rate, "overlap": overlap} for group, rate, overlap in values]

    def shares(cells):
        return {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lab_results.explained(cells)[2:]}

    by_c = shares([cell_of(0.1 - 0.05 * own_std_at_start(**s), **s) for s in settings])
    assert by_c["own std at the start"] == by_c["log2 G, own std at the start, their product"] == 1
    assert by_c["overlap"] == 0 and by_c["log2 G"] < 0.7
    by_overlap = shares([cell_of(0.05 * (s["overlap"] == 0.5), **s) for s in settings])
    assert by_overlap["overlap"] == 1 and by_overlap["own std at the start"] == 0


def test_best_rates_and_other_methods_by_hand():
    cells = [cell_of(0.01, rate=rate, group=group) for rate, group in ((2.0, 8), (2.0, 8), (4.0, 0))]
    exact, sampled = lab_results.rates(cells)[2:]
    assert (
        exact == "| exact | 1 | 4.00 [4.00, 4.00] | 1, 0 |" and sampled == "| sampled | 2 | 2.00 [2.00, 2.00] | 2, 0 |"
    )
    two = [cell_of(gain, methods=("mean", "std", "max_rl")) for gain in (0.01, -0.02)]
    assert lab_results.methods_table(two)[2:] == [
        "| `std` | 0 | -0.020, -0.005, +0.010 | 1, 1, 2 |",
        "| `max_rl` | 0 | -0.040, -0.010, +0.020 | 1, 1, 2 |",
    ]


SPEED = {2: 0.01, 3: 0.015, 4: 0.05, 8: 0.2}  # accuracy a step at a rate; others learn nothing
CEILING = {2: 1.0, 3: 1.0, 4: 0.9, 8: 0.6}


def test_each_method_at_its_best_rates(monkeypatch):
    """From 0.1 to 0.55, half of the failures: rate 8 is the fastest, 4 has the largest area, 3 the second slowest."""
    asked = []

    def made_up(policies, method, rates, steps, at_step=lambda step, pi: None):
        asked.append((policies.seeds, rates.shape))
        later = 0.0 if policies.seeds == lab.TUNING_SEEDS else 0.01  # the reported seeds start a little higher
        time = np.arange(steps + 1)[:, None, None]
        speed, ceiling = (np.vectorize(lambda r, of=of: of.get(int(r), 0.1))(rates)[None] for of in (SPEED, CEILING))
        accuracy = np.minimum(0.1 + later + np.where(ceiling > 0.1, speed, 0) * time, ceiling)
        column = np.broadcast_to(np.arange(rates.shape[1]), accuracy.shape)
        for step in range(steps + 1):
            at_step(step, np.full((*rates.shape, 2, 2), 100.0 * step) + column[0][..., None, None])
        return Runs(accuracy, 0.1 * (column + 1), 0.05 * (column + 1), 0.3 + 0 * column, 0.4 + 0 * column)

    monkeypatch.setattr(log_linear, "train", made_up)
    monkeypatch.setattr(log_linear, "assumptions", lambda policies, pi: {"seen": pi.mean((1, 2))})
    monkeypatch.setattr(lab, "RATES", np.array([1.0, 2, 3, 4, 8, 16]))
    monkeypatch.setattr(lab, "STEPS", 100)
    policies = [Policies(Setting(prompts=2, answers=2), seeds) for seeds in (lab.TUNING_SEEDS, lab.SEEDS)]
    row = lab.measure_method("mean", *policies)
    assert asked == [(lab.TUNING_SEEDS, (8, 6)), (lab.SEEDS, (20, 3))]
    assert (row["rate_steps"], row["rate_area"], row["rate_slowest"]) == (8, 4, 3)
    assert not row["edge_steps"] and not row["edge_area"]

    def only(name):
        assert row[name].shape == (20,) and np.ptp(row[name]) < 1e-12
        return row[name][0]

    assert only("steps") == pytest.approx(2 + 0.04 / 0.09)  # between 0.51 and the ceiling, 0.6
    assert only("flow_time") == pytest.approx(3 * (0.55 - 0.11) / 0.015)
    assert only("final") == pytest.approx(0.9)
    curve = np.minimum(0.11 + 0.05 * np.arange(101), 0.9)
    assert only("area") == pytest.approx(curve.mean())
    assert [only(f"c_{name}") for name in ("steps", "area", "slowest")] == pytest.approx(
        [8 / 3 * 0.1 * k for k in (1, 2, 3)]
    )
    assert only("own_std_8_3_area") == pytest.approx(8 / 3 * 0.1)
    assert [only("variation_prompts"), only("variation_time"), only("dead")] == pytest.approx([0.3, 0, 0.4])
    # of the slowest run, the third column: at the start, and half way to its 30 steps
    assert only("start_seen") == 2 and only("half_seen") == 1502

    monkeypatch.setattr(lab, "RATES", np.array([2.0, 3, 4, 8]))
    assert lab.measure_method("std", *policies)["edge_steps"]  # the largest rate is the fastest


def test_no_seed_is_both_tuned_on_and_reported():
    assert not set(lab.TUNING_SEEDS) & set(lab.SEEDS)


def test_command(tmp_path, monkeypatch):
    """As users run it, made short; a second command measures what is missing alone."""
    settings = [Setting(overlap, 0.0, 0.3, group, prompts=6) for overlap in (0.0, 0.5) for group in (0, 4)]
    wanted = [("map", setting) for setting in settings]
    wanted += [("methods", Setting(group=4, prompts=6)), ("structures", Setting(features=0, prompts=6))]
    monkeypatch.setattr(lab, "cells", lambda coarse: wanted)
    folder = tmp_path / "lab"
    path = folder / "cells.csv"
    folder.mkdir()
    lab.write_cells(path, wanted[:3], jobs=1)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:200])  # killed in the midst of the third: half of std's row
    lab.main(["--output_dir", str(folder), "--jobs", "1"])
    again = path.read_text()
    assert again.startswith("".join(lines[:6])) and lines[6] in again
    assert again.count(lines[1]) == 1  # what was whole isn't measured again
    files = {"cells.csv", "lab.csv", "lab_methods.csv", "lab.md", "map.png", "predictor.png"}
    assert {file.name for file in folder.iterdir()} == files
    text = (folder / "lab.md").read_text()
    assert "`median_mad`" in text and "features = 0" in text
    assert len(lab_cells.read_cells(path)) == len(wanted)


def test_command_line_says_what_is_wrong(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        (["--jobs", 0, "--output_dir", tmp_path], "error: --jobs 0 must be at least 1"),
        (["--output_dir", file], f"error: --output_dir {file} can't be written to: File exists"),
    ):
        with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
            lab.main(list(map(str, arguments)))
