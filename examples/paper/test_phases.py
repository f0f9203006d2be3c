"""examples/paper/phases.py and rollout_noise.py: their arithmetic by hand, and both as users run them."""

import csv
import math
import re
from itertools import product
from pathlib import Path

import pytest

from examples.ablation.curves import Run, tidy_rows
from examples.ablation.train import Flipped
from examples.paper import rollout_noise
from examples.paper.phases_results import (
    bound_table,
    interference_table,
    lead,
    lead_table,
    measured_rows,
    over_seeds,
    phase_of,
    phase_table,
    spans,
    speed_table,
    within,
)
from examples.tasks.correctness import SameText
from trl_ext.ablate.page import log_rows, write_csv
from trl_ext.ablate.study import Result, Variant, make_run

EXAMPLES = Path(__file__).parents[1]


def run_of(method, seed, accuracies, *, orthogonal=(), bounds=(), sigma=0.3):
    """Evaluated at steps 0, 10, ...; interference at 1, 6, ...; sigma at every step from 1."""
    last = 10 * (len(accuracies) - 1)
    logs = [{"step": 10 * i, "eval_accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    logs += [{"step": step, "curvature/sigma_mean": sigma} for step in range(1, last + 1)]
    for i, share in enumerate(orthogonal):
        logs.append({"step": 5 * i + 1, "interference/near_orthogonal_frac": share, "interference/cos_std": 1 - share})
    for i, bound in enumerate(bounds):
        more = {"theory/negative_pairs_frac": 0.4, "theory/r1": 3.0, "theory/r2": 1.5}
        logs.append({"step": 5 * i + 1, "theory/m_bound_p95": bound, **more})
    return Run(method, 0.1, seed, tidy_rows(logs))


FINALS = {
    "mean": [
        run_of("mean", 0, (0.2, 0.4, 0.8), orthogonal=(1.0, 0.9, 0.8, 0.8), bounds=(1, 1000, 5, 20)),
        run_of("mean", 1, (0.2, 0.6, 0.8), orthogonal=(0.8, 0.9, 0.8, 0.8), bounds=(3, 3, 5, 20)),
    ],
    "std": [run_of("std", 0, (0.2, 0.6, 0.8)), run_of("std", 1, (0.2, 0.9, 0.8))],
}


def test_spans_of_steps():
    assert spans(FINALS) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    run = FINALS["mean"][0]
    assert within(run, "near_orthogonal_frac", (0, 8)) == [1.0, 0.9]
    assert within(run, "near_orthogonal_frac", (16, 20)) == []
    assert over_seeds([run], "near_orthogonal_frac", (0, 8)) == "0.950"
    assert over_seeds([run], "m_bound_p95", (0, 12)) == "5 (5 to 5)"  # the median
    lines = interference_table(FINALS)
    assert lines[2].startswith("| `mean` | 1 to 4 | 0.900 +- 1.271 |")  # t = 12.7 of two seeds
    assert "| 2 (1 to 3) |" in lines[2] and "| 0.300 +- 0.000 |" in lines[2]


def test_the_lead_is_paired():
    found = {step: one for step, (_, _, one) in lead(FINALS).items()}
    assert list(found) == [0, 10, 20] and [one.estimate for one in found.values()] == pytest.approx([0, 0.25, 0])
    assert (found[10].low, found[10].high) == pytest.approx((0.25 - 12.706 * 0.05, 0.25 + 12.706 * 0.05))
    assert lead_table(FINALS)[3].startswith("| 10 | 0.500 | 0.750 | +0.250 [")
    # areas (0.2 / 2 + x + 0.8 / 2) / 2: 0.45 and 0.55, 0.55 and 0.7
    assert lead_table(FINALS)[-1].startswith("| mean over training | 0.500 | 0.625 | +0.125 [")


def test_steps_are_compared_by_their_logarithm():
    # to 0.6: mean 15 and 10, std 10 and 10 * 4/7; the constant is 8/3 of 0.3
    (line,) = speed_table(FINALS, [0.6])[2:]
    ratio = math.exp((math.log(10 / 15) + math.log(4 / 7)) / 2)
    assert line.startswith(f"| 0.6 | 2 | {ratio:.2f} [") and line.endswith("| 0.80 [0.80, 0.80] |")
    assert len(speed_table(FINALS, [0.95])) == 2  # nobody got there


def test_phases_are_the_papers():
    assert [phase_of(*row) for row in ((0.977, 0.045), (0.803, 0.066), (0.524, 0.130))] == [1, 2, 3]
    lines = phase_table(FINALS)
    assert lines[2] == "| `mean` | 1 to 4 | 50% | 0% | 50% |" and lines[3] == "| `mean` | 5 to 8 | 100% | 0% | 0% |"
    assert lines[-1].startswith("| `std` |") and "%" not in lines[-1]


def test_bounds():
    lines = bound_table(FINALS)
    assert len(lines) == 3  # std measured none
    assert lines[2].startswith("| `mean` | 8 |") and "| 62% | 0.40 | 3.0, 1.50 |" in lines[2]


def test_rows_of_what_was_measured():
    rows = measured_rows(FINALS)
    first = [row for row in rows if (row["method"], row["seed"]) == ("mean", 0)]
    assert [row["step"] for row in first] == [0, 1, 6, 10, 11, 16, 20]
    assert first[1]["near_orthogonal_frac"] == 1.0 and first[1]["m_bound_p95"] == 1


def test_flipped_rewards():
    """A tenth of 20,000, in training alone; what is logged as accuracy isn't flipped."""
    logged = []
    judge = Flipped(SameText(), 0.1, seed=0)
    answers, gold = ["a"] * 20_000, ["a", "b"] * 10_000
    rewards = judge(answers, noisy=[True] * 20_000, gold=gold, log_metric=lambda *one: logged.append(one))
    wrong = sum(reward != (truth == "a") for reward, truth in zip(rewards, gold, strict=True))
    assert 1850 < wrong < 2150 and set(rewards) == {0.0, 1.0}
    assert logged == [("accuracy", 0.5)]
    assert judge(["a", "b"], noisy=[False, False], gold=["a", "a"]) == [1.0, 0.0]


def csv_after(done, file):
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_phases_of_a_study(launch, tmp_path):
    """``results.csv`` as the ablation writes it; a failed run isn't counted, the sweep gives the ratio of rates."""
    logs = [
        {"step": 0, "eval_accuracy": 0.2},
        {
            "step": 5,
            "interference/near_orthogonal_frac": 0.9,
            "interference/cos_std": 0.05,
            "phase": 1.0,
            "learning_rate": 0.0,
        },
        {"step": 10, "eval_accuracy": 0.8, "curvature/sigma_mean": 0.3},
    ]
    runs = {
        name: [
            (make_run(tmp_path, Variant(name, {}), 0.1, seed), Result(status, logs=logs))
            for seed, status in enumerate(("finished", "finished", "failed"))
        ]
        for name in ("mean", "std")
    }
    write_csv(tmp_path / "results.csv", log_rows("comparison", runs))
    rows = csv_after(launch("paper/phases.py", tmp_path), tmp_path / "phases.csv")
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in ("mean", "std") for s in "01"}
    assert [row["training_phase"] for row in rows[:3]] == ["", "1.0", ""]
    assert {"phases.md", "phases.png", "phases.csv"} <= {f.name for f in tmp_path.iterdir()}
    assert "## The lead of `std`" in (tmp_path / "phases.md").read_text()
    assert "usage: phases.py FOLDER" in launch("paper/phases.py").stderr


@pytest.mark.nightly
def test_rollout_noise_as_users_run_it(launch, mixed_policy, tmp_path):
    options = "--seeds 42 --groups 2 4 --steps 1 --train_steps 1 --output_dir"
    arguments = [*options.split(), tmp_path]
    done = launch("paper/rollout_noise.py", *arguments)
    rows = csv_after(done, tmp_path / "rollout_noise.csv")
    assert {(row["state"], row["group"]) for row in rows} == set(product(("before training", "after training"), "24"))
    file = tmp_path / "rollout_noise.md"
    assert file.read_text() in done.stdout
    again = launch("paper/rollout_noise.py", *arguments)
    assert again.returncode == 0 and "done" not in again.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--groups", "1"], "error: --groups 1 must be at least 2"),
        (["--seeds", "0", "0"], "error: --seeds has 0 more than once"),
        (["--output_dir", __file__], f"error: --output_dir {__file__} can't be written to: File exists"),
    ],
)
def test_what_rollout_noise_refuses(arguments, error):
    with pytest.raises(SystemExit, match=f"^{re.escape(error)}$"):
        rollout_noise.parse_arguments(arguments)
