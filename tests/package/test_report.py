"""``python -m trl_ext report``: from the folders of runs to a page and numbers."""

import json
import re

import numpy as np
import pytest
from harness import reward_with_dead, train
from markupsafe import Markup
from run_folders import change_config, copy, gradients, log_of, metrics, page_of

from grpo_kernels.recorder.files import StepExtras, write_step
from trl_ext.report.charts import curves_of_a_run, sigma_and_curvature, without_outliers
from trl_ext.report.command import main
from trl_ext.report.first_screen import FirstScreen
from trl_ext.report.groups import differences, group_runs, mean_and_band
from trl_ext.report.numbers import MOST_HEATMAPS, MOST_PROMPTS, PromptCurvature, cluster_order, report_numbers
from trl_ext.report.read_run import read_run
from trl_ext.report.run_files import LOG_FILE
from trl_ext.report.sections import MAIN_CHART, SECTIONS
from trl_ext.report.theory import theory
from trl_ext.report.verdicts import LEVELS


def test_the_command_writes_a_page_and_numbers_and_prints_the_summary(reported_run, tmp_path, capsys):
    page = page_of(reported_run, "--json", tmp_path / "numbers.json", folder=tmp_path / "deep")
    printed, numbers = capsys.readouterr().out, json.loads((tmp_path / "numbers.json").read_text())
    lines = re.findall(r"^  (\S.*)", printed, re.M)
    screen = FirstScreen(**{**numbers["screen"], "obstacles": [], "changes": []})
    assert "first, up to step 6:" in printed and lines[0] == screen.learned
    assert sum(line.startswith("Try ") for line in lines) == len(numbers["screen"]["changes"]) <= 3
    assert sum(line.split(":")[0] in LEVELS for line in lines) == len(numbers["diagnosis"]["verdicts"])
    assert len(page.encode()) < 5e6
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", page), "something to be fetched"
    for section in SECTIONS.values():
        assert Markup.escape(section.heading) in page  # as a section, or among those that aren't in the log
    assert numbers["logged_interference_steps"] == 6 and len(numbers["heatmaps"]) == 6
    assert numbers["curves"]["main"]["reward"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert numbers["config"]["num_generations"] == 4


def test_numbers_are_those_of_the_files(reported_run):
    run = read_run(reported_run)
    numbers = report_numbers(run)
    record, shown = run.records[0], numbers.heatmaps[0]
    matrix = np.array(shown.cosines)
    assert np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    assert pairs.mean() == pytest.approx(record.metrics["interference/cos_mean"], abs=0.01)
    assert shown.live == record.metrics["interference/live_prompts"] == len(shown.prompts)
    assert all(text in record.prompt_text_P for text in shown.prompts) and len(set(shown.prompts)) > 1
    counts = numbers.histogram.counts
    live_pairs = [one.live * (one.live - 1) // 2 for one in numbers.heatmaps]
    first, last = counts
    assert (first, last) == ("first third", "last third")
    assert sum(counts[first]) == sum(live_pairs[:2]) and sum(counts[last]) == sum(live_pairs[-2:])
    for name in ("compute/seconds_generation", "compute/seconds_rewards", "compute/seconds_training"):
        assert all(value > 0 for value in numbers.curves["compute"][name].values), name


def test_clusters_stand_together():
    signs = np.array([1, -1, 1, 1, -1, -1, 1, -1])
    matrix = np.outer(signs, signs) * 0.8 + 0.2 * np.eye(8)
    ordered = signs[cluster_order(matrix)]
    assert (np.diff(ordered) != 0).sum() == 1
    assert cluster_order(np.eye(2)).tolist() == [0, 1]


def test_pairs_that_conflict_and_agree(tmp_path):
    texts = [f"prompt {p} of {'left' if p < 4 else 'right'}" for p in range(8)]
    write_step(tmp_path, 3, gradients(8, 4), metrics(), range(8), texts)
    numbers = report_numbers(read_run(tmp_path))
    found = numbers.pairs
    for pair in found["conflict"]:
        assert pair.cosine < 0 and {text.split()[-1] for text in pair.prompts} == {"left", "right"}
    for pair in found["agree"]:
        assert pair.cosine > 0 and len({text.split()[-1] for text in pair.prompts}) == 1
    assert [pair.cosine for pair in found["conflict"]] == sorted(pair.cosine for pair in found["conflict"])
    pairs = {(pair.step, pair.sketch_rmse) for pair in found["conflict"] + found["agree"]}
    assert pairs == {(3, 0.02)}
    assert sum(numbers.histogram.counts["first third"]) == 28


def test_one_number_for_one_measurement(tiny_policy, tmp_path):
    """Measured every third step, logged every second: curves, heatmaps, tables and phases say when it was measured."""
    options = {"gradient_accumulation_steps": 4, "interference_every": 3, "interference_dim": 16, "max_steps": 8}
    train(tiny_policy, tmp_path, reward_with_dead(0.0), logging_steps=2, **options)
    run = read_run(tmp_path)
    numbers = report_numbers(run)
    assert [entry["step"] for entry in run.logs if "interference/cos_mean" in entry] == [2, 4, 8]
    assert numbers.curves["interference"]["interference/cos_mean"].steps == [1, 4, 7]
    assert [one.step for one in numbers.heatmaps] == [1, 4, 7]
    points = [*(pair for kind in numbers.pairs.values() for pair in kind), *numbers.sigma_and_curvature]
    assert {point.step for point in points} <= {1, 4, 7}
    assert {step for span in numbers.phases for step in (span.first, span.last)} <= {1, 4, 7}
    assert numbers.curves["main"]["reward"].steps == [2, 4, 6, 8]
    assert (tmp_path / "interference" / "step_00000007.npz").is_file()


def test_sections_without_numbers_are_not_shown_but_named(tmp_path):
    page = page_of(log_of(tmp_path / "plain", [{"step": 1, "loss": 0.0, "reward": 0.5}]), folder=tmp_path)
    assert page.count("interference_every=10") == 1 and "Cosines of a logged step" not in page
    assert '<section id="interference"' not in page and "Not in this run's log: " in page


def test_much_is_reduced_and_said(tmp_path):
    """1,000 logged steps, one of them with 512 prompts."""
    step = gradients(6, 2)
    for place in range(0, 10_000, 10):
        write_step(tmp_path / "long", place, step, metrics(), range(6), ["a prompt"] * 6)
    write_step(tmp_path / "long", 9_990, gradients(512, 2), metrics(), range(512), ["x" * 300] * 512)
    numbers = report_numbers(read_run(tmp_path / "long"))
    assert numbers.logged_interference_steps == 1000 and len(numbers.heatmaps) == MOST_HEATMAPS
    assert numbers.heatmaps[-1].live == 512 and len(numbers.heatmaps[-1].cosines) == MOST_PROMPTS
    page = page_of(tmp_path / "long", folder=tmp_path)
    assert len(page.encode()) < 15e6
    assert f"{MOST_HEATMAPS} of 1000 logged steps have a heatmap here" in page and "at most 64 prompts" in page


def test_texts_are_shown_as_they_are(tmp_path):
    """A prompt or an answer with markup in it is text, in the tables and on hover."""
    nasty = [NASTY, "<script>alert(1)</script>", "a <b>bold</b> & 'quoted' prompt", "x", "y"]
    write_step(tmp_path / "run", 0, gradients(5, 2), metrics(), range(5), nasty, more=StepExtras(tasks=nasty))
    rows = [{"step": 1, "prompt": text, "answer": NASTY, "rewards": {NASTY: 1.0}, "advantage": 0.5} for text in nasty]
    (tmp_path / "run" / "sampled_completions.json").write_text(json.dumps(rows))
    page = page_of(tmp_path / "run", folder=tmp_path)
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert NASTY not in page and "</script><img" not in page and "&lt;/script&gt;&lt;img" in page


NASTY = "</script><img src=x onerror=document.title='taken'>"


def series(name, *values, **more):
    return [{name: value, **more} for value in values]


C, CORRELATION = "curvature/speedup_constant", "curvature/directional_corr"
THEORY = {
    "helps": (series(C, 0.5), 1, "converges faster with division by the std (C = 0.50"),
    "doesn't": (series(C, 1.5), 1, "gains nothing from division by the std (C = 1.50"),
    "measured": (series(CORRELATION, 0.5, 0.6, 0.7, **{C: 0.5}), 1, "+0.60 [+0.35, +0.85] over 3 steps: it follows it"),
    "against": (series(CORRELATION, -0.5, -0.6, -0.7, **{C: 0.5}), 1, "it doesn't, against the theory"),
    "not told": (series(CORRELATION, -0.5, 0.6, 0.1, **{C: 0.5}), 1, "can't tell"),
    "phase": (series("phase", 1, 2), 0, "Phase 2 since step 1, last measured at step 1: they begin to"),
    "phase 2 from the first": (series("phase", *[2] * 4), 0, "Phase 2 since step 0, last measured at step 3"),
}


@pytest.mark.parametrize("name", THEORY)
def test_what_the_theory_says_of_a_run(name, tmp_path):
    entries, line, expected = THEORY[name]
    folder = log_of(tmp_path / "run", [{**entry, "step": step} for step, entry in enumerate(entries)])
    assert expected in theory(read_run(folder))[line]


# ---- several runs


def test_seeds_without_a_common_step_are_drawn_one_by_one(tmp_path):
    for name, first in (("s0", 1), ("s1", 11)):
        log_of(tmp_path / name, [{"step": first + i, "reward": 0.5} for i in range(3)], learning_rate=0.1, seed=first)
    page = page_of(tmp_path / "s0", tmp_path / "s1", folder=tmp_path)
    assert '"name":"s0"' in page and '"name":"s1"' in page


def test_runs_of_one_name_are_told_apart(reported_run, tmp_path):
    folders = [copy(reported_run, tmp_path / parent / "run") for parent in ("one", "two")]
    page = page_of(*folders, folder=tmp_path)
    assert "one/run" in page and "two/run" in page


ONE = {"normalization": "std"}


def test_seeds_belong_together(tmp_path):
    """Two seeds of one configuration, and another normalisation."""
    folders = [
        log_of(tmp_path / name, [{"step": i, "reward": i / 10 + more} for i in range(1, 4)], seed=seed, **other)
        for name, seed, more, other in (("a0", 0, 0, ONE), ("a1", 1, 0.5, ONE), ("b", 0, 0, {"normalization": "mean"}))
    ]
    runs = [read_run(folder) for folder in folders]
    groups = group_runs(runs)
    assert [[run.name for run in group.runs] for group in groups] == [["a0", "a1"], ["b"]]
    band = mean_and_band(groups[0], "reward")
    assert np.allclose(band.low, [0.1, 0.2, 0.3]) and np.allclose(band.high, [0.6, 0.7, 0.8])
    assert np.allclose(band.mean, [0.35, 0.45, 0.55])
    assert dict(differences(runs)) == {"normalization": ["'std'", "'std'", "'mean'"], "seed": ["0", "1", "0"]}
    page = page_of(*folders, folder=tmp_path)
    assert "a0, a1 (mean and range of 2 runs)" in page and "What differs in configuration" in page


# ---- bad input


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    return str(stopped.value)


def test_bad_input_is_named(reported_run, tmp_path):
    page = ["-o", tmp_path / "page.html"]
    assert "no such folder" in refused(tmp_path / "nowhere", *page)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not the folder of a run" in refused(empty, *page)
    (empty / "trainer_state.json").write_text("not json")
    assert "trainer_state.json is skipped" in refused(empty, *page)
    assert "given twice" in refused(reported_run, reported_run, *page)
    assert "it is a folder" in refused(reported_run, "-o", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert "can't be written" in refused(reported_run, "-o", file / "page.html")
    log = copy(reported_run, tmp_path / "kept") / LOG_FILE
    before = log.read_text()
    assert "isn't a report's" in refused(reported_run, "-o", log) and log.read_text() == before
    assert "isn't a report's" in refused(reported_run, *page, "--json", log.with_name("trainer_state.json"))
    other = log_of(tmp_path / "other", [{"step": 1, "perplexity": 3.0}])
    assert "have no metric in common" in refused(reported_run, other, *page)
    assert not (tmp_path / "page.html").exists(), "nothing is left behind"


def test_parts_of_the_model_where_they_are_logged(tiny_policy, tmp_path):
    train(tiny_policy, tmp_path / "run", interference_parts=True, interference_every=1, max_steps=3)
    shares = [one.share for one in report_numbers(read_run(tmp_path / "run")).parts.values()]
    assert sum(shares) == pytest.approx(1, abs=0.02) and len(shares) > 4
    assert "Share and cosine by part" in page_of(tmp_path / "run", folder=tmp_path)


def test_odd_options_in_a_configuration(reported_run, tmp_path):
    folder = copy(reported_run, tmp_path / "odd")
    change_config(folder, normalization=["a"], reward_weights=["a"])
    page_of(folder, folder=tmp_path)


def test_the_page_lands_in_the_run_s_folder(reported_run, tmp_path, capsys):
    folder = copy(reported_run, tmp_path / "run")
    main(["report", str(folder)])
    assert "<html" in (folder / "report.html").read_text() and str(folder / "report.html") in capsys.readouterr().out


def test_one_far_value_does_not_take_a_curve_s_scale(tmp_path):
    values = [*[0.5, 0.6] * 20, 400.0]
    folder = log_of(tmp_path / "run", [{"step": i, "loss": 0.0, "reward": value} for i, value in enumerate(values)])
    figure = curves_of_a_run(MAIN_CHART, report_numbers(read_run(folder)).curves["main"], {})
    assert figure.layout.yaxis.range[1] < 0.7 and "(1 beyond)" in figure.layout.yaxis.title.text


def test_a_far_point_does_not_take_the_scale():
    values = [0.01 * i for i in range(20)] + [4.0]
    assert without_outliers(values) == (0.0, pytest.approx(0.19))
    assert without_outliers([1.0, 2.0]) == (1.0, 2.0)
    points = [PromptCurvature(i, 0.3, value) for i, value in enumerate(values)]
    axis = sigma_and_curvature(points).layout.yaxis
    assert axis.range[1] < 0.3 and "1 beyond" in axis.title.text
