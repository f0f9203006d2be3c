"""``python -m trl_ext report``: from the folders of real runs to a page, figures and numbers; in a real browser."""

import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_skipping import build, reward_with_dead
from test_trainer import build as build_plain
from test_trainer_equality import prompts

from grpo_kernels.interference.step_gradients import StepGradients
from trl_ext.recorder.files import read_interference, write_step
from trl_ext.report.charts import curves_of_a_run, sigma_and_curvature, without_outliers
from trl_ext.report.command import main
from trl_ext.report.completions import read_completions, rows_of
from trl_ext.report.groups import differences, group_runs, mean_and_band
from trl_ext.report.numbers import MOST_HEATMAPS, MOST_PROMPTS, cluster_order, extreme_pairs, histogram, report_numbers
from trl_ext.report.read_run import read_run
from trl_ext.report.run_files import CONFIG_FILE, LOG_FILE, STARTED, RunFiles
from trl_ext.report.sections import Curves
from trl_ext.report.summary import summary

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def run_folder(tiny_policy, tmp_path_factory):
    """Six steps, all of them logged, of a real run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = {"per_device_train_batch_size": 8, "interference_every": 1, "interference_dim": 16, "max_steps": 6}
    trainer = build(tiny_policy, folder, reward_with_dead(0.2), save_strategy="steps", save_steps=4, **options)
    trainer.train()
    trainer.save_state()
    return folder


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def page_of(*arguments, folder):
    main(["report", *map(str, arguments), "-o", str(folder / "page.html")])
    return (folder / "page.html").read_text()


def test_the_command_as_users_call_it(run_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trl_ext", "report", str(run_folder), "-o", str(tmp_path / "deep" / "page.html"),
         "--figures", str(tmp_path / "figures"), "--json", str(tmp_path / "numbers.json")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    told = len(numbers["summary"]) + len(numbers["diagnosis"]["verdicts"])
    assert "first, up to step 6:" in done.stdout and len(re.findall(r"^  \S", done.stdout, re.M)) == told
    page = (tmp_path / "deep" / "page.html").read_text()
    assert len(page.encode()) < 5e6
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", page), "something to be fetched"
    for heading in ("Did it learn?", "What the normalisation did", "in one another", "follow the curvature",
                    "constants", "Where the work went", "Definitions"):  # fmt: skip
        assert heading in page
    assert numbers["summary"] == [line.strip() for line in done.stdout.splitlines()[1:6]]
    assert numbers["logged_interference_steps"] == 6 and len(numbers["heatmaps"]) == 6
    assert numbers["curves"]["learning"]["reward"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert numbers["config"]["num_generations"] == 4
    drawn = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert {"reward", "cosine_mean", "cosines", "cosine_histogram", "speedup_constant", "skipped"} <= drawn
    assert {file.suffix for file in (tmp_path / "figures").iterdir()} == {".pdf", ".png"}
    assert (tmp_path / "figures" / "reward.pdf").read_bytes()[:5] == b"%PDF-"


def test_numbers_are_those_of_the_files(run_folder):
    run = read_run(run_folder)
    numbers = report_numbers(run)
    record, shown = run.records[0], numbers["heatmaps"][0]
    matrix = np.array(shown["cosines"])
    assert np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    assert pairs.mean() == pytest.approx(record.metrics["interference/cos_mean"], abs=0.01)
    assert shown["live"] == record.metrics["interference/live_prompts"] == len(shown["prompts"])
    assert all(text in record.prompt_text_P for text in shown["prompts"]) and len(set(shown["prompts"])) > 1
    spread = numbers["histogram"]
    live_pairs = [n * (n - 1) // 2 for n in (one["live"] for one in numbers["heatmaps"])]
    first, last = spread["counts"]
    assert re.fullmatch(r"first third \(reliability -?\d\.\d\d\)", first) and last.startswith("last third (")
    assert sum(spread["counts"][first]) == sum(live_pairs[:2]) and sum(spread["counts"][last]) == sum(live_pairs[-2:])
    for name in ("compute/seconds_generation", "compute/seconds_rewards", "compute/seconds_training"):
        assert all(value > 0 for value in numbers["curves"]["compute"][name]["values"]), name
    assert any("of the sequences had no gradient" in line for line in numbers["summary"])


def gradients(prompts, answers, seed=0, dim=12):
    """A step of random contributions; the prompts' gradients of the two halves point apart."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(prompts * answers, dim, generator=generator, dtype=torch.float64)
    prompt_B = torch.arange(prompts).repeat_interleave(answers)
    u[:, 0] += torch.where(prompt_B < prompts // 2, 3.0, -3.0)
    reward = torch.randint(0, 2, (prompts * answers,), generator=generator).double()
    return StepGradients(u @ u.T, prompt_B, reward, torch.randn(len(reward), generator=generator), answers)


def metrics(**more):
    return {"interference/reliability": 0.5, "interference/sketch_rmse": 0.02, "reward": 0.5, **more}


def test_clusters_stand_together():
    signs = np.array([1, -1, 1, 1, -1, -1, 1, -1])
    matrix = np.outer(signs, signs) * 0.8 + 0.2 * np.eye(8)
    ordered = signs[cluster_order(matrix)]
    assert (np.diff(ordered) != 0).sum() == 1
    assert cluster_order(np.eye(2)).tolist() == [0, 1]


def test_pairs_that_conflict_and_agree(tmp_path):
    texts = [f"prompt {p} of {'left' if p < 4 else 'right'}" for p in range(8)]
    write_step(tmp_path, 3, gradients(8, 4), metrics(), range(8), texts)
    found = extreme_pairs(read_run(tmp_path).records)
    for pair in found["conflict"]:
        assert pair["cosine"] < 0 and {text.split()[-1] for text in pair["prompts"]} == {"left", "right"}
    for pair in found["agree"]:
        assert pair["cosine"] > 0 and len({text.split()[-1] for text in pair["prompts"]}) == 1
    assert [p["cosine"] for p in found["conflict"]] == sorted(p["cosine"] for p in found["conflict"])
    assert all(pair["step"] == 3 and pair["sketch_rmse"] == 0.02 and pair["reliability"] == 0.5
               for kind in found.values() for pair in kind)  # fmt: skip
    assert sum(histogram(read_run(tmp_path).records)["counts"]["first third (reliability 0.50)"]) == 28


# ---- runs as they are found


def test_a_run_that_was_killed(run_folder, tmp_path, capsys):
    """No final state, a checkpoint at step 4, the log up to step 6 with half a line, half a file of a step."""
    folder = copy(run_folder, tmp_path / "killed")
    (folder / "trainer_state.json").unlink()
    shutil.rmtree(folder / "checkpoint-6")
    with open(folder / LOG_FILE, "a") as file:
        file.write('{"reward": 0.5, "st')
    broken = folder / "interference" / "step_00000002.npz"
    broken.write_bytes(broken.read_bytes()[:100])
    page_of(folder, folder=tmp_path)
    said = capsys.readouterr().out
    assert "up to step 6" in said and "killed: 2 skipped" in said
    assert "step_00000002.npz is skipped" in said and "1 of 8 lines are skipped" in said
    run = read_run(folder)
    assert len(run.records) == 5 and run.series("reward")[0] == [1, 2, 3, 4, 5, 6]
    (folder / LOG_FILE).unlink()
    assert read_run(folder).series("reward")[0] == [1, 2, 3, 4], "the newest checkpoint's"
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert read_run(folder).series("interference/cos_mean")[0] == [1, 3, 4, 5, 6], "the files' own metrics"


def test_one_number_for_one_measurement(tiny_policy, tmp_path):
    """Measured every third step, logged every second: curves, heatmaps, tables and phases say when it was measured."""
    options = {"per_device_train_batch_size": 8, "interference_every": 3, "interference_dim": 16, "max_steps": 8}
    build(tiny_policy, tmp_path, reward_with_dead(0.0), logging_steps=2, **options).train()
    run = read_run(tmp_path)
    numbers = report_numbers(run)
    assert [entry["step"] for entry in run.logs if "interference/cos_mean" in entry] == [2, 4, 8]
    assert numbers["curves"]["interference"]["interference/cos_mean"]["steps"] == [1, 4, 7]
    assert [one["step"] for one in numbers["heatmaps"]] == [1, 4, 7]
    assert {pair["step"] for kind in numbers["pairs"].values() for pair in kind} <= {1, 4, 7}
    assert {point["step"] for point in numbers["sigma_and_curvature"]} <= {1, 4, 7}
    assert {span[end] for span in numbers["phases"] for end in ("first", "last")} <= {1, 4, 7}
    assert numbers["curves"]["learning"]["reward"]["steps"] == [2, 4, 6, 8]
    assert (tmp_path / "interference" / "step_00000007.npz").is_file()


def test_missing_values_are_gaps(tmp_path):
    """A metric that most entries have, NaN in one and not there in another; of a rare one the others aren't gaps."""
    entries = [{"step": step, "loss": 0.0, "reward": 0.5, "grad_norm": float(step)} for step in range(1, 8)]
    entries[2]["grad_norm"] = math.nan
    del entries[4]["grad_norm"]
    entries[0]["theory/r1"] = entries[5]["theory/r1"] = 2.0
    entries.insert(3, {"step": 3, "eval_accuracy": 0.5})
    run = read_run(log_of(tmp_path / "run", entries))
    curves = report_numbers(run)["curves"]
    assert curves["learning"]["grad_norm"]["steps"] == [1, 2, 3, 4, 5, 6, 7]
    assert curves["learning"]["grad_norm"]["values"] == [1, 2, None, 4, None, 6, 7]
    assert curves["theory"]["theory/r1"] == {"steps": [1, 6], "values": [2, 2]}
    assert curves["learning"]["eval_accuracy"] == {"steps": [3], "values": [0.5]}
    assert run.series("grad_norm")[0] == [1, 2, 4, 6, 7] and run.last("grad_norm") == 7
    figure = curves_of_a_run(Curves("", "", {"grad_norm": "norm"}), curves["learning"], {})
    assert figure.data[0].y == (1, 2, None, 4, None, 6, 7) and not figure.data[0].connectgaps
    band = mean_and_band(group_runs([run])[0], "grad_norm")
    assert [math.isnan(value) for value in band["mean"]] == [False, False, True, False, True, False, False]


def test_a_step_evaluated_twice_is_explained(tmp_path):
    entries = [{"step": 0, "eval_accuracy": 0.4}, {"step": 1, "loss": 0.0, "reward": 0.5}]
    entries += [{"step": 1, "eval_accuracy": 0.5}, {"step": 1, "eval_accuracy": 0.7}]
    numbers = report_numbers(read_run(log_of(tmp_path / "run", entries)))
    assert numbers["curves"]["learning"]["eval_accuracy"] == {"steps": [0, 1], "values": [0.4, pytest.approx(0.6)]}
    (note,) = numbers["notes"]
    assert note.startswith("Step 1 was evaluated 2 times (0.500, 0.700): answers are sampled")
    assert note in page_of(tmp_path / "run", folder=tmp_path)


def test_a_resumed_run_has_each_step_once(run_folder, tmp_path):
    folder = copy(run_folder, tmp_path / "resumed")
    for state in folder.rglob("trainer_state.json"):
        state.unlink()
    lines = (folder / LOG_FILE).read_text().splitlines()
    later = [json.dumps({**json.loads(line), "reward": 9.0}) for line in lines[4:6]]
    (folder / LOG_FILE).write_text("\n".join([*lines[:6], *later]))
    steps, rewards = read_run(folder).series("reward")
    assert steps == [1, 2, 3, 4, 5, 6] and rewards[4:] == [9.0, 9.0] and 9.0 not in rewards[:4]


def test_a_run_without_interference_says_how(run_folder, tmp_path):
    folder = copy(run_folder, tmp_path / "plain")
    shutil.rmtree(folder / "interference")
    logs = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    logs = [{k: v for k, v in log.items() if not k.startswith(("interference", "curvature", "theory"))} for log in logs]
    (folder / LOG_FILE).write_text("\n".join(map(json.dumps, logs)))
    (folder / "trainer_state.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-6", ignore_errors=True)
    page = page_of(folder, folder=tmp_path)
    assert page.count("interference_every=10") == 4  # so many sections come from it
    assert "Cosines of a logged step" not in page


def test_much_is_reduced_and_said(tmp_path):
    """1,000 logged steps, one of them with 512 prompts."""
    step = gradients(6, 2)
    for place in range(0, 10_000, 10):
        write_step(tmp_path / "long", place, step, metrics(), range(6), ["a prompt"] * 6)
    write_step(tmp_path / "long", 9_990, gradients(512, 2), metrics(), range(512), ["x" * 300] * 512)
    numbers = report_numbers(read_run(tmp_path / "long"))
    assert numbers["logged_interference_steps"] == 1000 and len(numbers["heatmaps"]) == MOST_HEATMAPS
    assert numbers["heatmaps"][-1]["live"] == 512 and len(numbers["heatmaps"][-1]["cosines"]) == MOST_PROMPTS
    page = page_of(tmp_path / "long", folder=tmp_path)
    assert len(page.encode()) < 15e6
    assert f"{MOST_HEATMAPS} of 1000 logged steps have a heatmap here" in page and "at most 64 prompts" in page


def test_texts_are_shown_as_they_are(tmp_path):
    """A prompt or an answer with markup in it is text, in the tables and on hover."""
    nasty = [NASTY, "<script>alert(1)</script>", "a <b>bold</b> & 'quoted' prompt", "x", "y"]
    write_step(tmp_path / "run", 0, gradients(5, 2), metrics(), range(5), nasty, tasks=nasty)
    rows = [{"step": 1, "prompt": text, "answer": NASTY, "rewards": {NASTY: 1.0}, "advantage": 0.5} for text in nasty]
    (tmp_path / "run" / "sampled_completions.json").write_text(json.dumps(rows))
    page = page_of(tmp_path / "run", folder=tmp_path)
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert NASTY not in page and "</script><img" not in page and "&lt;/script&gt;&lt;img" in page


NASTY = "</script><img src=x onerror=document.title='taken'>"


def log_of(folder, entries):
    folder.mkdir()
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / LOG_FILE).write_text("\n".join(lines))
    return folder


def test_a_run_that_starts_anew_in_a_used_folder(run_folder, tmp_path):
    """Its log counts, not the earlier run's state and checkpoints; files from before it began are named."""
    folder = copy(run_folder, tmp_path / "again")
    log = (folder / LOG_FILE).read_text().splitlines()
    (folder / LOG_FILE).write_text(log[0])
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, STARTED: config[STARTED] + 3600}))
    run = read_run(folder)
    assert run.last_step == 1 and not run.records
    assert any("6 files are skipped, they are older than the run" in problem for problem in run.problems)


def test_where_a_run_goes_on(tiny_policy, tmp_path):
    """Killed in the middle of a line, resumed two steps earlier: each step once, the later one's."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "interference_every": 0}
    build(tiny_policy, tmp_path, **options).train()
    with open(tmp_path / LOG_FILE, "a") as file:
        file.write('{"reward": 0.5')
    started = json.loads((tmp_path / CONFIG_FILE).read_text())[STARTED]
    build(tiny_policy, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run = read_run(tmp_path)
    assert run.series("reward")[0] == [1, 2, 3, 4] and len(run.problems) == 1
    assert run.config[STARTED] == started


@pytest.mark.parametrize(
    "change",
    [
        {"reward": np.zeros(3)}, {"coefficient": np.zeros(2)}, {"prompt_id": np.arange(2)}, {"step": np.arange(2)},
        {"metrics": np.frombuffer(b"[1]", np.uint8)}, {"metrics": np.frombuffer(b'{"a": "b"}', np.uint8)},
        {"texts": np.frombuffer(b'["a"]', np.uint8)}, {"sigma": np.array(["a"] * 8)},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_file_whose_parts_do_not_fit(change, tmp_path):
    for step in (1, 2):
        path = write_step(tmp_path, step, gradients(8, 4), metrics(), range(8), ["text"] * 8)
    arrays = dict(np.load(path))
    np.savez_compressed(path, **{**arrays, **change})
    run = read_run(tmp_path)
    assert [record.step for record in run.records] == [1] and len(run.problems) == 1
    assert path.name in run.problems[0]
    report_numbers(run)


def test_odd_lines_in_a_log(tmp_path):
    odd = ['{"step": NaN, "reward": 1}', "[" * 100_000, "[1]", '{"step": 3, "reward": Infinity, "phase": 7}',
           f'{{"step": 4, "reward": {"9" * 400}}}', '{"step": 5, "reward": "high"}', ""]  # fmt: skip
    folder = log_of(tmp_path / "odd", [{"step": 1, "reward": 0.5, "phase": 2}, *odd, {"step": 6, "reward": 0.75}])
    run = read_run(folder)
    assert run.series("reward") == ([1, 6], [0.5, 0.75])
    numbers = report_numbers(run)
    assert [span["phase"] for span in numbers["phases"]] == [2]
    (found,) = [one for one in numbers["diagnosis"]["verdicts"] if one["name"] == "not_finite"]
    assert found["onset"] == 3 and found["level"] == "critical"
    main(["report", str(folder), "-o", str(tmp_path / "page.html"), "--json", str(tmp_path / "numbers.json")])
    json.loads((tmp_path / "numbers.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))


RUNS = {
    "learned": ([{"eval_accuracy": a} for a in (0.2, 0.3, 0.4, 0.5)], 0, "It learned: held-out accuracy 0.200 at step"),
    "three evaluations": ([{"eval_accuracy": a} for a in (0.2, 0.4, 0.9)], 0, "Too early to tell whether it learned"),
    "three rewards": ([{"reward": a} for a in (0.9, 0.4, 0.1)], 0, "Too early to tell whether it learned: 3 rewards"),
    "the same": ([{"reward": 0.5}] * 4, 0, "By its reward it did not change: from 0.500 to 0.500"),
    "worse": ([{"reward": a} for a in (0.9, 0.6, 0.3, 0.0)], 0, "it got worse"),
    "one value": ([{"reward": 0.5}], 0, "can't be told"),
    "helps": ([{"curvature/speedup_constant": 0.5}], 2, "converges faster with division by the std (C = 0.50"),
    "doesn't": ([{"curvature/speedup_constant": 1.5}], 2, "gains nothing from division by the std (C = 1.50"),
    "measured": ([{"curvature/speedup_constant": 0.5, "curvature/directional_corr": c} for c in (0.5, 0.6, 0.7)], 2,
                 "+0.60 [+0.35, +0.85] over 3 steps: it follows it"),
    "against": ([{"curvature/speedup_constant": 0.5, "curvature/directional_corr": c} for c in (-0.5, -0.6, -0.7)], 2,
                "it doesn't, against the theory"),
    "not told": ([{"curvature/speedup_constant": 0.5, "curvature/directional_corr": c} for c in (-0.5, 0.6, 0.1)], 2,
                 "can't tell"),
    "phase": ([{"phase": 1}, {"phase": 2}], 1, "Phase 2 since step 1, last measured at step 1: they begin to"),
    "phase 2 from the first": ([{"phase": 2}] * 4, 1, "Phase 2 since step 0, last measured at step 3"),
    "no choice": ([{"curvature/sigma_mean": 0.5}], 3, "can't be told: no C"),
    "saved": ([{"compute/sequences_skipped_frac": 0.5, "compute/flops_saved_frac": 0.6}], 4, "50% of the sequences"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_summary_says_what_happened(name, tmp_path):
    entries, line, expected = RUNS[name]
    folder = log_of(tmp_path / "run", [{**entry, "step": step} for step, entry in enumerate(entries)])
    lines = summary(read_run(folder))
    assert len(lines) == 5 and expected in lines[line]


@pytest.mark.parametrize(
    ("constant", "group", "advice", "more"),
    [
        (0.5, 8, "std. C was 0.50 at first, and with 8 answers to a prompt it is worth no more than a learning rate",
         "; with 32 answers +0.039."),
        (0.5, 32, "std. C was 0.50 at first, and with 32 answers to a prompt it is worth +0.039 of accuracy", "."),
        (1.2, 8, "std or mean. C was 1.20 at first, and with 8 answers to a prompt it is worth no more than a learning "
         "rate", "."),
    ],
)  # fmt: skip
def test_the_summary_says_which_normalisation(constant, group, advice, more, tmp_path):
    """By the first tenth of the log: later groups are all right, and C is low whatever it was."""
    sigmas = [3 / 8 * constant] * 2 + [0.0] * 18
    logs = [{"curvature/sigma_mean": sigma, "loss": 0.0, "step": step} for step, sigma in enumerate(sigmas, 1)]
    folder = log_of(tmp_path / "run", [*logs, {"curvature/speedup_constant": 0.1, "loss": 0.0, "step": 21}])
    (folder / CONFIG_FILE).write_text(json.dumps({"num_generations": group}))
    assert summary(read_run(folder))[3] == f"Which normalisation: {advice} on a log-linear policy{more}"


# ---- several runs


def test_seeds_without_a_common_step_are_drawn_one_by_one(tmp_path):
    for name, first in (("s0", 1), ("s1", 11)):
        log_of(tmp_path / name, [{"step": first + i, "reward": 0.5} for i in range(3)])
        (tmp_path / name / CONFIG_FILE).write_text(json.dumps({"learning_rate": 0.1, "seed": first}))
    page = page_of(tmp_path / "s0", tmp_path / "s1", folder=tmp_path)
    assert '"name":"s0"' in page and '"name":"s1"' in page


def test_runs_of_one_name_are_told_apart(run_folder, tmp_path):
    """Also where it is one that matplotlib would read as mathematics."""
    folders = [copy(run_folder, tmp_path / parent / "_a$x^$b") for parent in ("one", "two")]
    page = page_of(*folders, "--figures", tmp_path / "figures", folder=tmp_path)
    assert "one/_a$x^$b" in page and "two/_a$x^$b" in page
    assert {"cosines_run1.png", "cosines_run2.png"} <= {file.name for file in (tmp_path / "figures").iterdir()}


@pytest.fixture
def three_runs(run_folder, tmp_path):
    """Two seeds of one configuration, and another normalisation."""
    for name, change in (("a0", {"seed": 0}), ("a1", {"seed": 1}), ("b", {"seed": 0, "normalization": "mean"})):
        folder = copy(run_folder, tmp_path / name)
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **change, "output_dir": str(folder)}))
    log = tmp_path / "a1" / "trainer_state.json"
    state = json.loads(log.read_text())
    for entry in state["log_history"]:
        if "reward" in entry:
            entry["reward"] += 0.5
    log.write_text(json.dumps(state))
    (tmp_path / "a1" / LOG_FILE).unlink()
    return [tmp_path / name for name in ("a0", "a1", "b")]


def test_seeds_belong_together(three_runs, tmp_path):
    runs = [read_run(folder) for folder in three_runs]
    groups = group_runs(runs)
    assert [[run.name for run in group.runs] for group in groups] == [["a0", "a1"], ["b"]]
    band = mean_and_band(groups[0], "reward")
    assert np.allclose(np.array(band["high"]) - band["low"], 0.5)
    assert np.allclose(band["mean"], np.array(band["low"]) + 0.25)
    assert dict(differences(runs)) == {"normalization": ["None", "None", "'mean'"], "seed": ["0", "1", "0"]}
    page = page_of(*three_runs, "--figures", tmp_path / "figures", folder=tmp_path)
    assert "a0, a1 (mean and range of 2 runs)" in page and "What differs in configuration" in page
    assert (tmp_path / "figures" / "cosines_run3.pdf").is_file()


# ---- bad input


def refused(*arguments, capsys=None):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    return str(stopped.value)


def test_bad_input_is_named(run_folder, three_runs, tmp_path):
    page = ["-o", tmp_path / "page.html"]
    assert "no such folder" in refused(tmp_path / "nowhere", *page)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not the folder of a run" in refused(empty, *page)
    (empty / "trainer_state.json").write_text("not json")
    assert "trainer_state.json is skipped" in refused(empty, *page)
    assert "given twice" in refused(run_folder, run_folder, *page)
    assert "it is a folder" in refused(run_folder, "-o", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert "can't be written" in refused(run_folder, "-o", file / "page.html")
    assert "is not a folder" in refused(run_folder, *page, "--figures", file)
    assert "is not a folder" in refused(run_folder, *page, "--figures", file / "below")
    log = copy(run_folder, tmp_path / "kept") / LOG_FILE
    before = log.read_text()
    assert "isn't a report's" in refused(run_folder, "-o", log) and log.read_text() == before
    assert "isn't a report's" in refused(run_folder, *page, "--json", log.with_name("trainer_state.json"))
    other = tmp_path / "other"
    other.mkdir()
    (other / LOG_FILE).write_text('{"step": 1, "perplexity": 3.0}\n')
    assert "have no metric in common" in refused(run_folder, other, *page)
    assert not (tmp_path / "page.html").exists(), "nothing is left behind"


# ---- while it goes


def test_the_runs_files_never_stop_a_run(tiny_policy, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("trl_ext.report.run_files.logger.warning", lambda text, *args, **kwargs: said.append(text))
    trainer = build(tiny_policy, tmp_path / "run", max_steps=2)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / LOG_FILE).mkdir()  # can't be written
    trainer.train()
    assert trainer.state.global_step == 2 and len(said) == 1 and "Training goes on" in said[0]


def test_parts_and_tasks_where_they_are_logged(tiny_policy, tmp_path):
    dataset = prompts(32).add_column("task", ["up" if i % 2 else "down" for i in range(32)])
    options = {"interference_parts": True, "interference_every": 1, "per_device_train_batch_size": 32, "max_steps": 3}
    build_plain(tiny_policy, tmp_path / "run", train_dataset=dataset, **options).train()
    numbers = report_numbers(read_run(tmp_path / "run"))
    shares = [one["share"] for one in numbers["parts"].values()]
    assert sum(shares) == pytest.approx(1, abs=0.02) and len(shares) > 4
    assert numbers["tasks"]["names"] == ["down", "up"]
    assert numbers["tasks"]["cosines"][0][1] == numbers["tasks"]["cosines"][1][0]
    page = page_of(tmp_path / "run", folder=tmp_path)
    assert "Share and cosine by part" in page and "Task against task" in page


# ---- answers that are kept


def test_answers_are_kept_and_thinned(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.report.completions.MOST", 40)
    options = {"per_device_train_batch_size": 8, "interference_every": 1, "interference_dim": 16, "max_steps": 14}
    trainer = build(tiny_policy, tmp_path, reward_with_dead(0.4), **options)
    trainer.train()
    rows = read_completions(tmp_path)
    steps = sorted({row["step"] for row in rows})
    assert 8 <= len(rows) <= 40 and steps[0] == 1 and {b - a for a, b in pairwise(steps)} <= {2, 4}
    for step in steps:
        of_step = [row for row in rows if row["step"] == step]
        by_prompt = [of_step[i : i + 4] for i in range(0, len(of_step), 4)]
        assert len(by_prompt) in (1, 2) and all(len({row["prompt"] for row in group}) == 1 for group in by_prompt)
        if len(by_prompt) == 2:  # one live, one dead
            assert any(row["advantage"] for row in by_prompt[0]) and not any(row["advantage"] for row in by_prompt[1])
        assert all(isinstance(value, float) for row in of_step for value in row["rewards"].values())
    records = {record.step: record for record in read_interference(tmp_path)}
    assert any(rows[0]["prompt"].startswith(text[:40]) for text in records[1].prompt_text_P)


def test_answers_that_can_not_be_kept_stop_nothing(tiny_policy, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("trl_ext.report.completions.logger.warning", said.append)
    monkeypatch.setattr("trl_ext.report.completions.rows_of", lambda *_: 1 / 0)
    (tmp_path / "sampled_completions.json").write_text("null")
    trainer = build(tiny_policy, tmp_path, max_steps=3, interference_every=1)
    trainer.train()
    assert trainer.state.global_step == 3 and len(said) == 1 and "ZeroDivisionError" in said[0]


@pytest.mark.parametrize(
    "content",
    ["null", "5", "[" * 5000, '[{"step": 1, "prompt": "p", "answer": "a"}]',
     '[{"step": [1], "prompt": "p", "answer": "a"}]',
     '[{"step": 1, "prompt": "p", "answer": "a", "rewards": {"r": "x"}, "advantage": 0}]'],
)  # fmt: skip
def test_a_file_of_answers_that_is_odd(content, run_folder, tmp_path):
    folder = copy(run_folder, tmp_path / "odd")
    (folder / "sampled_completions.json").write_text(content)
    assert read_completions(folder) == []
    assert "No answers were kept" in page_of(folder, folder=tmp_path)


def test_an_evaluations_answers_are_not_the_steps(tiny_policy, tmp_path):
    """TRL keeps both in one table, and a step on older rollouts follows an evaluation."""
    held = type(prompts(8)).from_dict({"prompt": [[{"role": "user", "content": f"held out {i}"}] for i in range(8)]})
    options = {
        "num_iterations": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_generations_eval": 4,
        "max_steps": 6,
    }
    build_plain(tiny_policy, tmp_path, interference_every=1, eval_dataset=held, **options).train()
    rows = read_completions(tmp_path)
    assert rows and not any("held out" in row["prompt"] for row in rows)


def test_odd_options_in_a_configuration(run_folder, tmp_path):
    folder = copy(run_folder, tmp_path / "odd")
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "normalization": ["a"], "reward_weights": ["a"]}))
    page_of(folder, folder=tmp_path)


# ---- in a browser


@pytest.fixture
def browser():
    if CHROMIUM is None or DRIVER is None or find_spec("selenium") is None:
        pytest.skip("chromium, chromedriver or selenium isn't here: the page isn't opened in a browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--window-size=1280,900"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def set_width(browser, width):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(width, browser, run_folder, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page_of(run_folder, folder=tmp_path)
    set_width(browser, width)
    browser.get((tmp_path / "page.html").as_uri())
    wait = WebDriverWait(browser, 30)
    wait.until(lambda b: b.execute_script("return document.body.dataset.drawn"))
    plots = browser.find_elements(By.CSS_SELECTOR, ".plot.js-plotly-plot")
    assert len(plots) > 12 and len(plots) == len(browser.find_elements(By.CSS_SELECTOR, ".plot"))
    # nothing is wider than the screen
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for plot in plots:
        inner = browser.execute_script("return arguments[0].querySelector('svg.main-svg').clientWidth", plot)
        assert 0 < inner <= plot.size["width"] <= width

    heatmap = next(plot for plot in plots if plot.find_elements(By.CSS_SELECTOR, ".slider-container"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", heatmap)
    title = lambda: heatmap.find_element(By.CSS_SELECTOR, ".gtitle").text  # noqa: E731
    assert title().startswith("step 1:")
    ticks = heatmap.find_elements(By.CSS_SELECTOR, ".slider-rail-touch-rect")
    ActionChains(browser).move_to_element_with_offset(ticks[0], ticks[0].size["width"] // 2 - 4, 0).click().perform()
    wait.until(lambda b: title().startswith("step 6:"))

    shown = report_numbers(read_run(run_folder))["heatmaps"][-1]

    def hover(browser):
        """Over the cell at the top left, wherever it is by now: margins follow the labels."""
        area = heatmap.find_element(By.CSS_SELECTOR, ".nsewdrag")
        half = 0.5 / len(shown["prompts"]) - 0.5  # the middle of the cell
        corner = round(half * area.size["width"]), round(half * area.size["height"])
        ActionChains(browser).move_to_element(area).move_to_element_with_offset(area, *corner).perform()
        return heatmap.find_elements(By.CSS_SELECTOR, ".hoverlayer .hovertext")

    wait.until(hover)
    hovered = "".join(heatmap.find_element(By.CSS_SELECTOR, ".hoverlayer").text.split())
    # the cell at the top left: its row's and its column's prompt are the first
    first = "".join(f"1. {shown['prompts'][0]}".split())
    assert hovered.count(first) == 2 and "cosine1.00" in hovered
    box = heatmap.find_element(By.CSS_SELECTOR, ".hoverlayer .hovertext").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    chosen = browser.find_element(By.CSS_SELECTOR, ".chosen-step")

    def shown_steps():
        rows = browser.find_elements(By.CSS_SELECTOR, ".of-step:not([hidden])")
        return [one.get_attribute("data-step") for one in rows]

    assert shown_steps() == ["6"]
    browser.execute_script("arguments[0].value = '2'; arguments[0].dispatchEvent(new Event('change'))", chosen)
    assert shown_steps() == ["2"]
    assert browser.execute_script("return document.documentElement.scrollHeight") < (5000 if width == 1280 else 12000)
    columns = {one.location["x"] for one in browser.find_elements(By.CSS_SELECTOR, "#learning .part")}
    assert len(columns) == (2 if width == 1280 else 1)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
    browser.save_screenshot(str(tmp_path / f"page_{width}.png"))
    assert Path(tmp_path / f"page_{width}.png").stat().st_size > 10_000


# ---- what a page says of few points, far points and saved answers


@pytest.mark.parametrize(
    "rewards", [[0, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 1], [0.5, 0.1, 0.9, 0.3, 0.2, 0.4, 0.8, 0.7]]
)
def test_saved_answers_span_the_rewards(rewards):
    """The lowest and the highest of a group are among the four that are kept."""
    logs = {
        "prompt": ["p"] * 8, "completion": [f"answer {i}" for i in range(8)], "advantages": [1.0] * 8,
        "rewards": {"f": rewards},
    }  # fmt: skip
    kept = [row["rewards"]["f"] for row in rows_of(logs, 1, 8)]
    assert len(kept) == 4 and min(kept) == min(rewards) and max(kept) == max(rewards)


def test_a_resumed_log_has_no_empty_line(tmp_path):
    """Where a kill left half a line, the next entry begins a line of its own."""
    args = SimpleNamespace(output_dir=str(tmp_path))
    files, state = RunFiles(dict), SimpleNamespace(is_world_process_zero=True, global_step=0)
    files.on_train_begin(args, state, None)
    files.on_log(args, state, None, {"reward": 1.0})
    for tail in ("", '{"reward": 0.'):
        with open(tmp_path / LOG_FILE, "a") as file:
            file.write(tail)
        state.global_step += 1
        files.on_train_begin(args, state, None)
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    assert "" not in lines and len(lines) == 4 and lines[2] == '{"reward": 0.'
    assert [json.loads(lines[i])["step"] for i in (0, 1, 3)] == [0, 1, 2]


def test_a_far_point_does_not_take_the_scale():
    values = [0.01 * i for i in range(20)] + [4.0]
    assert without_outliers(values) == (0.0, pytest.approx(0.19))
    assert without_outliers([1.0, 2.0]) == (1.0, 2.0)
    points = [{"step": i, "sigma": 0.3, "curvature": value} for i, value in enumerate(values)]
    axis = sigma_and_curvature(points).layout.yaxis
    assert axis.range[1] < 0.3 and "1 beyond" in axis.title.text
