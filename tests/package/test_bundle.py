"""``report --bundle``: a run as one small file without what is private; ``compare`` of two."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import change_config, copy, gradients, log_of, metrics

from grpo_kernels.recorder.files import read_interference, write_step
from trl_ext.__main__ import __doc__ as usage
from trl_ext.report.bundle import LOGGED, MOST_BYTES, MOST_ENTRIES, read_bundle, thinned
from trl_ext.report.command import main
from trl_ext.report.compare_command import main as compare
from trl_ext.report.compare_runs import compare_runs
from trl_ext.report.completions import read_completions
from trl_ext.report.configuration import OWN_FUNCTION, SHARED, shared_options
from trl_ext.report.read_run import read_run
from trl_ext.report.verdicts import diagnose

PRIVATE = {
    "output_dir": "/home/alice/runs/first",
    "model_name_or_path": "/home/alice/models/small-7b",
    "run_name": "alice-1",
    "hub_model_id": "alice/secret",
    "hub_token": "hf_secret",
    "logging_dir": "runs/Nov30_alices-laptop",
    "normalization": "/home/alice/code/mine.py:scale",
}


def bundle_of(run: Path, file: Path, *more: str) -> str:
    main(["report", str(run), "--bundle", "-o", str(file), *more])
    return file.read_text()


def data_of(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="run">(.*?)</script>', page, re.S)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))


def test_a_bundle_has_nothing_private(reported_run, tmp_path):
    folder = copy(reported_run, tmp_path / "first")
    change_config(folder, **PRIVATE)
    page = bundle_of(folder, tmp_path / "bundle.html")
    prompts = {text for record in read_interference(folder) for text in record.prompt_text_P}
    answers = {row.answer for row in read_completions(folder)} | {row.prompt for row in read_completions(folder)}
    assert prompts and answers
    texts = [text for text in prompts | answers if len(text) > 5]
    found = [text for text in texts if text in page or json.dumps(text)[1:-1] in page]
    assert not found
    words = ("alice", "secret", str(tmp_path), "/home/", "/root/")
    found = [word for word in words if word in page]
    assert not found
    assert "small-7b" in page and "What got in the way" in page and "Cosines of a logged step" in page
    data = data_of(page)
    assert set(data["config"]) <= set(SHARED) and data["config"]["num_generations"] == 4
    assert data["config"]["normalization"] == OWN_FUNCTION, "not what scale_rewards would say"


def test_texts_are_in_a_bundle_where_they_are_asked_for(reported_run, tmp_path):
    page = bundle_of(reported_run, tmp_path / "bundle.html", "--with-texts")
    assert any(text[:40] in page for record in read_interference(reported_run) for text in record.prompt_text_P)
    assert 'class="chosen-step"' in page and str(tmp_path) not in page


def test_a_verdict_that_quotes_a_prompt_does_not_in_a_bundle(tmp_path):
    """One prompt dominates: its text is in the report's evidence and on its first screen."""
    run = tmp_path / "run"
    for step in range(1, 9):
        one = gradients(8, 4, seed=step)
        one.gram_BB[:4, :4] *= 10_000
        write_step(run, step, one, metrics(), range(8), [f"a private question {p}" for p in range(8)])
    (found,) = [one for one in diagnose(read_run(run)).verdicts if one.name == "dominated"]
    assert "private question" in found.evidence
    page = bundle_of(run, tmp_path / "bundle.html")
    assert "private question" not in page and "One prompt dominates" in page and "up to 100%.<br>" in page


def test_options_that_are_shared():
    config = {"seed": 3, "optim": "adamw_torch", "temperature": None, "normalization_kwargs": {"alpha": 0.5}}
    assert shared_options(config) == {"seed": 3, "optim": "adamw_torch", "normalization_kwargs": {"alpha": 0.5}}
    assert shared_options({"model_name_or_path": r"C:\Users\alice\small"}) == {"model_name_or_path": "small"}
    assert not shared_options({"optim": "a@b", "reward_weights": ["/x"], "normalization_kwargs": {"a": "../b"}})


def test_a_long_run_stays_below_the_limit(tmp_path):
    """200,000 logged numbers of 60 metrics, and 15 steps of 64 prompts."""
    rng = np.random.default_rng(0)
    names = [*LOGGED, *(f"rewards/function_{i}/mean" for i in range(40)), "completions/max_length", "kl", "loss"]
    entries = [dict(zip(names, rng.normal(size=len(names)), strict=True), step=step) for step in range(1, 4001)]
    run = log_of(tmp_path / "long", entries, max_steps=4000)
    for step in range(50, 751, 50):
        write_step(run, step, gradients(64, 4, seed=step), metrics(), range(64), [f"text {p}" for p in range(64)])
    page = bundle_of(run, tmp_path / "bundle.html")
    assert 2e6 < len(page.encode()) < MOST_BYTES
    assert len(data_of(page)["logs"]["step"]) <= 2 * MOST_ENTRIES
    assert read_bundle(tmp_path / "bundle.html")[0].last_step == 4000


def test_two_long_runs_keep_common_steps(monkeypatch):
    monkeypatch.setattr("trl_ext.report.bundle.MOST_ENTRIES", 50)
    long, short = (thinned([{"step": step, "reward": 0.0, "x": 1} for step in range(10, n, 10)]) for n in (4001, 1001))
    common = {one["step"] for one in long} & {one["step"] for one in short}
    assert len(long) <= 50 and len(short) <= 50 and len(common) >= 12 and "x" not in long[0]
    odd = thinned([{"step": step, "reward": 0.0} for step in range(1, 4001, 20)])
    assert 40 <= len(odd) <= 50
    evaluations = [{"step": step, "eval_accuracy": 0.5} for step in range(1, 4001, 200)]
    assert [one for one in thinned([*evaluations, *odd]) if "eval_accuracy" in one] == evaluations


def two_runs(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 60)) / 50
    for row, (name, rate, rise) in enumerate((("one", 1e-4, 0.0), ("two", 2e-4, 0.2))):
        values = 0.4 + rise + noise[row]
        dead = {"normalization/zero_variance_frac": 1.0} if name == "two" else {}
        entries = [{"step": i + 1, "loss": 0.0, "reward": float(v), **dead} for i, v in enumerate(values)]
        log_of(tmp_path / name, entries, learning_rate=rate, seed=1, output_dir=f"/home/alice/{name}")
    return tmp_path / "one", tmp_path / "two"


def test_compare_says_what_differs(tmp_path, capsys):
    runs = two_runs(tmp_path)
    files = [tmp_path / f"{run.name}.html" for run in runs]
    for run, file in zip(runs, files, strict=True):
        bundle_of(run, file)
    one = compare_runs(*(read_bundle(file)[0] for file in files))[0]
    other = compare_runs(*map(read_run, runs))[0]
    assert (one.label, one.told) == (other.label, other.told) == ("reward in training", True)
    assert (one.first, one.second, one.low, one.high) == pytest.approx(
        (other.first, other.second, other.low, other.high), rel=1e-4
    )
    capsys.readouterr()
    compare([str(file) for file in files])
    printed = capsys.readouterr().out
    assert "A: one, up to step 60" in printed
    assert re.search(r"reward in training +0\.\d+ +0\.\d+  \+0\.2 \[.*\] \*", printed)
    assert "learning_rate: 0.0001, 0.0002" in printed and "seed" not in printed and "alice" not in printed
    assert "Only B: critical: Most groups teach nothing, since step 1" in printed
    compare([str(run) for run in runs])
    assert capsys.readouterr().out == printed, "folders compare as their bundles do"


def test_what_is_no_bundle(tmp_path, capsys):
    (tmp_path / "page.html").write_text("<html>")
    for file in ("page.html", "absent.html"):
        with pytest.raises(SystemExit) as stopped:
            compare([str(tmp_path / file), str(tmp_path / file)])
        assert stopped.value.code == 2 and "is no bundle of" in capsys.readouterr().err
    for arguments in (["report", "a", "b", "--bundle"], ["report", "a", "--with-texts"]):
        with pytest.raises(SystemExit, match="a bundle is of one run"):
            main(arguments)


def test_the_command_is_listed():
    assert "compare A B" in usage
