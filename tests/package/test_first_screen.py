"""The report's first screen, by hand: did it learn, what got in the way, what next; and two runs against each other."""

import pytest
from run_folders import log_of, page_of

from trl_ext.report.compare_runs import compare_runs
from trl_ext.report.first_screen import first_screen, learned, obstacles, scatter, truncated_tokens
from trl_ext.report.next_experiment import Change, hacked, next_experiment, untried
from trl_ext.report.read_run import read_run
from trl_ext.report.verdicts import diagnose


def run_of(folder, name, *values, config=None, **more):
    entries = [{"step": step, "loss": 0.0, name: value, **more} for step, value in enumerate(values)]
    if name.startswith("eval_"):
        entries = [{key: value for key, value in entry.items() if key != "loss"} for entry in entries]
    return read_run(log_of(folder / "run", entries, **(config or {})))


SENTENCES = {
    "a steady rise has no noise": (
        "eval_accuracy", [0.2, 0.3, 0.4, 0.5], {},
        "It learned: held-out accuracy 0.200 → 0.500, +0.300 [95 %: +0.300, +0.300] from step 0 to 3.",
    ),
    # 100 questions at 0.5 each: sqrt(2 * 0.25 / 102) = 0.0700, times 1.96 = 0.137
    "questions are counted": (
        "eval_accuracy", [0.5, 0.5, 0.5, 0.5], {"eval_runtime": 10.0, "eval_samples_per_second": 10.0},
        "No change can be told: held-out accuracy 0.500 → 0.500, +0.000 [95 %: -0.137, +0.137]",
    ),
    "three evaluations": ("eval_accuracy", [0.2, 0.4, 0.9], {}, "Too early to tell whether it learned"),
    "three rewards": ("reward", [0.9, 0.4, 0.1], {}, "Too early to tell whether it learned: reward in training 0.900"),
    "the same": ("reward", [0.5] * 4, {}, "It didn't change: reward in training 0.500 → 0.500"),
    "worse": ("reward", [0.9, 0.6, 0.3, 0.0], {}, "It got worse"),
    "one value": ("reward", [0.5], {}, "can't be told"),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_whether_it_learned_with_an_interval(name, tmp_path):
    metric, values, more, expected = SENTENCES[name]
    assert expected in learned(run_of(tmp_path, metric, *values, **more))


def test_a_trend_is_no_noise():
    assert scatter([0.0, 1.0, 2.0, 3.0]) == 0.0 and scatter([0.0, 1.0, 4.0]) == 0.0  # three: too few
    assert scatter([0.0, 1.0, 0.0, 1.0]) == pytest.approx((4 / 3) ** 0.5)  # second differences -2 and 2


def test_what_took_most_comes_first(tmp_path):
    """Of 10 s a step rewards take 3; of 40 tokens an answer, a tenth of the answers have 100."""
    metrics = {
        "normalization/zero_variance_frac": 0.4,
        "completions/clipped_ratio": 0.1,
        "completions/mean_length": 40.0,
        "compute/seconds_generation": 5.0,
        "compute/seconds_rewards": 3.0,
        "compute/seconds_training": 2.0,
        "clip_ratio/region_mean": 0.005,
    }
    run = run_of(tmp_path, "reward", 0.5, 0.5, config={"max_completion_length": 100}, **metrics)
    assert truncated_tokens(run) == pytest.approx(0.25)
    found = obstacles(run)
    assert [(one.name, round(one.share, 3), one.of) for one in found] == [
        ("in dead groups", 0.4, "answers"),
        ("in reward functions", 0.3, "seconds"),
        ("in truncated answers", 0.25, "generated tokens"),
    ]
    lines = first_screen(run, diagnose(run)).lines()
    assert "40% of the answers in dead groups; 30% of the seconds in reward functions" in lines[1]


CONFIG = {"learning_rate": 1e-4, "num_generations": 8, "normalization": "mean"}
C = {"curvature/speedup_constant": 0.8}


def options_of(run):
    return [change.option for change in next_experiment(run, diagnose(run))]


def test_the_next_experiment_is_at_most_three_options_to_set(tmp_path):
    hard = run_of(tmp_path, "reward", *[0.1] * 10, config=CONFIG, **C)
    assert options_of(hard) == ["normalization='max_rl'", "learning_rate=2.5e-05, 5e-05, 0.0002, 0.0004"]
    assert "verified" in next_experiment(hard, diagnose(hard))[0].reason
    (tmp_path / "easy").mkdir()
    easy = run_of(tmp_path / "easy", "reward", *[0.6] * 10, config=CONFIG, **C)
    assert options_of(easy) == ["normalization='std'", "learning_rate=2.5e-05, 5e-05, 0.0002, 0.0004"]


def test_a_verdict_s_option_comes_first(tmp_path):
    config = {**CONFIG, "normalization": "std", "max_completion_length": 64}
    cut = run_of(tmp_path, "reward", *[0.6] * 10, config=config, **C, **{"completions/clipped_ratio": 1.0})
    assert options_of(cut) == ["max_completion_length=128"]  # critical: nothing else until it is mended


def test_a_reward_that_pays_for_something_else_is_named_alone(tmp_path):
    """The reward rises, the held-out accuracy falls: no rate and no normalisation mends that."""
    logs = [{"step": i, "loss": 0.0, "reward": i / 10, **C} for i in range(10)]
    logs += [{"step": 0, "eval_accuracy": 0.5}, {"step": 9, "eval_accuracy": 0.1}]
    run = read_run(log_of(tmp_path / "run", sorted(logs, key=lambda log: log["step"]), **CONFIG))
    assert hacked(run) and options_of(run) == ["reward_funcs=[another reward]"]
    assert "while the reward in training rose 0.000 → 0.900" in learned(run)
    assert "The best held-out accuracy was 0.500, at step 0." in first_screen(run, diagnose(run)).cause


def test_dead_groups_ask_for_other_prompts(tmp_path):
    dead = {"normalization/zero_variance_frac": 0.6, "normalization/all_right_frac": 0.55}
    run = run_of(tmp_path, "reward", *[0.9] * 10, config={**CONFIG, "normalization": "std"}, **C, **dead)
    assert options_of(run)[0] == "train_dataset=[harder prompts]"
    assert obstacles(run)[0].name == "in dead groups (rewards: 55% all high)"


@pytest.mark.parametrize(("used", "dead", "told"), [("std", 0.7, True), ("mean", 0.7, False), ("std", 0.4, False)])
def test_dead_groups_of_both_kinds_ask_for_what_was_measured(used, dead, told, tmp_path):
    kinds = {"normalization/all_right_frac": dead / 2, "normalization/all_wrong_frac": dead / 2}
    config = {**CONFIG, "normalization": used}
    run = run_of(tmp_path, "reward", *[0.5] * 10, config=config, **{"normalization/zero_variance_frac": dead, **kinds})
    found = {one.option: one for one in next_experiment(run, diagnose(run))}
    assert ("normalization='none'" in found) == told
    if told:
        assert "verified" in found["normalization='none'"].reason and "+0.009" in found["normalization='none'"].effect


def test_a_normalisation_that_another_run_has_is_not_suggested():
    changes = [Change("normalization='std'", ""), Change("learning_rate=1", "")]
    assert untried(changes, [{"normalization": "std"}]) == changes[1:] == untried(changes, [{"scale_rewards": "group"}])


def test_a_run_of_trl_s_default_is_not_told_to_set_it(tmp_path):
    """One prompt dominates: std levels prompts, but the run has it already."""
    config = {"scale_rewards": "group", "num_generations": 8}
    spiky = {"normalization/advantage_max": 50.0, "normalization/scale_mean": 1.0}
    run = run_of(tmp_path, "reward", *[0.6] * 10, config=config, **spiky)
    assert [one.name for one in diagnose(run).verdicts] == ["coefficient_spikes"] and options_of(run) == []


def test_nothing_is_suggested_that_cannot_be_said(tmp_path):
    assert options_of(run_of(tmp_path, "reward", *[0.1] * 10)) == []  # TRL's run: no configuration, no C


def test_two_runs_side_by_side(tmp_path):
    runs = []
    for name, more in (("a", 0.0), ("b", 0.2)):
        logs = [{"step": i, "loss": 0.0, "reward": 0.5 + more + 0.01 * (i % 3), "grad_norm": 1.0} for i in range(30)]
        logs += [{"step": 30, "eval_accuracy": 0.5 + more, "eval_runtime": 1.0, "eval_samples_per_second": 200.0}]
        runs.append(read_run(log_of(tmp_path / name, logs, seed=0, name=name)))
    found = {one.label: one for one in compare_runs(*runs)}
    held_out = found["held-out accuracy at step 30"]  # 1.96 * sqrt((0.25 + 0.21) / 202) = 0.0935
    assert (held_out.low, held_out.high) == pytest.approx((0.2 - 0.094, 0.2 + 0.094), abs=1e-3) and held_out.told
    assert found["reward in training"].told and not found["gradient norm"].told
    page = page_of(tmp_path / "a", tmp_path / "b", folder=tmp_path)
    assert "b less a" in page and "held-out accuracy at step 30" in page
