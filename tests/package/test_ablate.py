"""``python -m trl_ext ablate``: statistics by hand, rates, plan and budget, what is varied."""

import math
import statistics

import pytest

from trl_ext.ablate.answer import answers, sentence
from trl_ext.ablate.compare import NEVER, differences, more_seeds, student, summarize
from trl_ext.ablate.plan import Plan, fit, parse_budget, seconds_of_a_run, tuning_seeds
from trl_ext.ablate.rates import Choice, beyond, choose_rate, grid, predicts_rates, sweep_scores
from trl_ext.ablate.study import Result, Variant, make_run, read_curve
from trl_ext.ablate.variants import make_variants

RATE = Choice(1e-4, False, 0.0, "given")


def logs(*values, metric="eval_reward"):
    """A log history with an evaluation at steps 0, 10, 20..., each 100 tokens and 5 seconds a step."""
    entries = []
    for i, value in enumerate(values):
        step = 10 * i
        if step:
            entries.append({"step": step, "num_tokens": 100.0 * step, "step_time": 5.0, "reward": value})
        entries.append({"step": step, metric: value})
    return entries


def outcome(*values, status="finished"):
    return Result(status, logs=logs(*values))


def compared(tmp_path, finals, **others):
    """The runs of variants by name, whose seeds end at these values."""
    return {
        name: [
            (
                make_run(tmp_path, Variant(name, {}), 1e-4, seed),
                value if isinstance(value, Result) else outcome(0.2, value),
            )
            for seed, value in enumerate(values)
        ]
        for name, values in finals.items()
    }


def found(tmp_path, finals, choices=None, **kwargs):
    runs = compared(tmp_path, finals)
    summaries, target = summarize(runs, choices or dict.fromkeys(finals, RATE), "eval_reward", kwargs.get("target"))
    return summaries, differences(summaries), target


# ---- intervals, by hand


def test_a_paired_difference_has_the_t_interval_of_its_seeds(tmp_path):
    _, (one,), _ = found(tmp_path, {"std": [0.5, 0.6, 0.7, 0.8], "mean": [0.52, 0.65, 0.71, 0.86]})
    values = [0.02, 0.05, 0.01, 0.06]
    half = 3.182 * statistics.stdev(values) / 2  # Student's t with 3 degrees of freedom, 97.5 %
    assert one.difference == pytest.approx(0.035)
    assert (one.low, one.high) == pytest.approx((0.035 - half, 0.035 + half), abs=4e-4)


def test_an_interval_is_1_4_times_as_wide_where_two_tuning_seeds_chose_the_rates(tmp_path):
    finals = {"std": [0.5, 0.6, 0.7], "mean": [0.52, 0.65, 0.71]}
    unknown = dict.fromkeys(finals, Choice(1e-4, False, None, ""))
    _, (plain,), _ = found(tmp_path, finals)
    _, (wide,), _ = found(tmp_path, finals, unknown)
    assert wide.high - wide.low == pytest.approx(1.4 * (plain.high - plain.low))
    assert wide.widened == "1.4"


def test_the_bootstrap_adds_the_variance_of_both_choices(tmp_path):
    finals = {"std": [0.5, 0.6, 0.7], "mean": [0.5, 0.6, 0.7]}
    _, (one,), _ = found(tmp_path, finals, {"std": Choice(1, False, 0.03, ""), "mean": Choice(1, False, 0.04, "")})
    assert one.high == pytest.approx(4.303 * 0.05, rel=0.01)  # the seeds add nothing here


def test_two_seeds_are_too_few_to_tell(tmp_path):
    _, (one,), _ = found(tmp_path, {"std": [0.5, 0.5], "mean": [0.9, 0.9]})
    assert math.isinf(one.low)
    assert "too few seeds to tell (2 seeds; +0.400)" in sentence(one, "std", 2)


def test_holm_takes_away_what_one_of_many_comparisons_shows(tmp_path):
    """t is 5.0 with 2 degrees of freedom: above 4.30 for one comparison, below 7.65 for the first of three."""
    spread = 0.01
    step = 5.0 * spread / math.sqrt(3)
    shifted = [0.5 + step - spread, 0.5 + step, 0.5 + step + spread]
    base = [0.5, 0.5, 0.5]
    _, (alone,), _ = found(tmp_path, {"std": base, "mean": shifted})
    flat = [0.49, 0.5, 0.51]
    _, several, _ = found(tmp_path, {"std": base, "mean": shifted, "loo": flat, "none": flat})
    assert alone.told
    assert not several[0].told
    assert several[0].low > 0
    assert "Holm's correction" in sentence(several[0], "std", 3)


@pytest.mark.parametrize(
    ("degrees", "tail", "quantile"),  # of printed tables
    [
        (1, 0.025, 12.706),
        (2, 0.025, 4.303),
        (3, 0.025, 3.182),
        (3, 0.005, 5.841),
        (4, 0.0005, 8.610),
        (9, 0.005, 3.250),
    ],
)
def test_students_quantiles_are_those_of_tables(degrees, tail, quantile):
    assert student(degrees, tail) == pytest.approx(quantile, abs=6e-4)


def test_the_placebo_is_no_comparison_that_holm_corrects_for(tmp_path):
    step = 5.0 * 0.01 / math.sqrt(3)  # t is 5.0: above 4.30 for one comparison, below 6.21 for two
    finals = {"std": [0.5] * 3, "mean": [0.5 + step + x for x in (-0.01, 0, 0.01)], "std (placebo)": [0.49, 0.5, 0.51]}
    _, (mean, placebo), _ = found(tmp_path, finals)
    assert mean.told and not placebo.told


def test_more_seeds_are_of_no_use_where_the_rates_are_unsure():
    assert more_seeds([-0.02, 0.0, 0.02], "bootstrap", 0.006) == (NEVER, NEVER)
    assert more_seeds([-0.02, 0.0, 0.02], "bootstrap", 0.004) > more_seeds([-0.02, 0.0, 0.02], "")


def test_failed_and_nan_runs_count_as_the_lowest_value_of_any_run(tmp_path):
    failed = Result("failed", "out of memory", logs=logs(0.1, 0.9))
    summaries, (one,), _ = found(tmp_path, {"std": [0.5, 0.6, 0.7], "mean": [failed, outcome(0.2, float("nan")), 0.7]})
    assert summaries[1].final == {0: 0.1, 1: 0.1, 2: 0.7}
    assert summaries[1].failed == 2
    assert one.difference < 0


def test_more_seeds_by_hand():
    """Spread 0.02 from 3 seeds; its 80 % interval by chi-squared with 2 degrees (0.211, 4.605) is 0.0132 to 0.0616.

    With 10 seeds 2.262 x 0.0132 / sqrt(10) is 0.0094, with 9 it is 0.0101; (2 x 0.0616 / 0.01)^2 is 152.
    """
    low, high = more_seeds([-0.02, 0.0, 0.02], "")
    assert low == 10 - 3
    assert high == pytest.approx(152 - 3, rel=0.1)


def test_the_answer_says_what_differs_and_what_cannot_be_told(tmp_path):
    summaries, differ, _ = found(
        tmp_path, {"std": [0.5, 0.6, 0.7], "max_rl": [0.53, 0.631, 0.73], "mean": [0.52, 0.57, 0.72]}
    )
    plan = Plan([], 1, [0, 1, 2], [], [], 1.0, 1)
    first, second = answers(plan, summaries, differ)
    assert first.startswith("max_rl ends 0.030 [0.029, 0.032] above std")
    assert second.startswith("mean and std can't be told apart with 3 seeds: +0.003 [")
    assert "more would be needed to tell 0.01" in second


# ---- curves, the target


def test_tokens_and_seconds_to_the_target(tmp_path):
    summaries, _, target = found(tmp_path, {"std": [outcome(0.2, 0.4, 0.7)], "mean": [outcome(0.2, 0.65, 0.7)]})
    assert target == pytest.approx(0.65)  # nine tenths of the way from 0.2 to 0.7
    assert (summaries[0].steps.median, summaries[1].steps.median) == (20, 10)
    assert (summaries[0].tokens.median, summaries[1].tokens.median) == (2000, 1000)
    assert (summaries[0].seconds.median, summaries[1].seconds.median) == (100, 50)


def test_a_run_that_never_gets_there_counts_as_more_than_it_had(tmp_path):
    summaries, _, _ = found(tmp_path, {"std": [0.7, 0.7], "mean": [0.3, 0.7]}, target=0.7)
    assert summaries[1].reached == 1
    assert summaries[1].steps.most == math.inf


def test_a_curve_keeps_the_last_of_two_evaluations_of_a_step():
    curve = read_curve(
        [{"step": 0, "eval_reward": 0.1}, {"step": 4, "eval_reward": 0.2}, {"step": 4, "eval_reward": 0.3}],
        "eval_reward",
    )
    assert (curve.steps, curve.values) == ([0, 4], [0.1, 0.3])
    assert curve.mean_over_training == pytest.approx(0.2)


# ---- learning rates


def test_the_best_rate_is_that_of_the_highest_mean_over_training(tmp_path):
    results = [
        (make_run(tmp_path, Variant("std", {}), rate, seed), outcome(0.2, value))
        for rate, values in {1e-4: (0.4, 0.5), 2e-4: (0.6, 0.4), 4e-4: (0.5, 0.3)}.items()
        for seed, value in enumerate(values)
    ]
    scores = sweep_scores(results, "eval_reward")
    assert scores[2e-4] == {0: pytest.approx(0.4), 1: pytest.approx(0.3)}
    choice = choose_rate(scores, scores, "given")
    assert (choice.rate, choice.at_edge, choice.error) == (2e-4, False, None)


def test_a_rate_whose_run_failed_is_not_chosen_for_its_other_seeds(tmp_path):
    results = [
        (make_run(tmp_path, Variant("std", {}), 1e-4, 0), outcome(0.2, 0.5)),
        (make_run(tmp_path, Variant("std", {}), 1e-4, 1), outcome(0.2, 0.5)),
        (make_run(tmp_path, Variant("std", {}), 2e-4, 0), outcome(0.2, 0.7)),
        (make_run(tmp_path, Variant("std", {}), 2e-4, 1), Result("failed", "NaN", logs=logs(0.2, 0.9))),
    ]
    scores = sweep_scores(results, "eval_reward")
    assert choose_rate(scores, scores, "").rate == 1e-4


def test_three_tuning_seeds_measure_the_choice():
    """One draw in 27 holds only the seed that prefers the other rate, 6 more hold it twice: those lose 0.1."""
    scores = {1e-4: {0: 0.5, 1: 0.5, 2: 0.2}, 2e-4: {0: 0.3, 1: 0.3, 2: 0.3}}
    choice = choose_rate(scores, scores, "")
    assert choice.rate == 1e-4
    ends = {rate: {seed: 3 * value for seed, value in by_seed.items()} for rate, by_seed in scores.items()}
    assert choose_rate(scores, ends, "").error == pytest.approx(3 * choice.error)  # of the last values
    # drawn twice or more, seed 2 makes the sums 0.9 against 0.9 (a tie goes to the smaller rate) and 0.6 against 0.9
    assert choice.error == pytest.approx(0.1 * math.sqrt(1 / 27), rel=0.35)


def test_rates_are_predicted_only_for_plain_sgd_on_policy_without_kl():
    config = {
        "optim": "sgd", "num_iterations": 1, "steps_per_generation": 4, "gradient_accumulation_steps": 4, "beta": 0.0,
        "max_grad_norm": 0.0, "interference_every": 5,
    }  # fmt: skip
    assert predicts_rates(config)
    for change in ({"optim": "adamw_torch"}, {"beta": 0.04}, {"num_iterations": 2}, {"steps_per_generation": 8}):
        assert not predicts_rates({**config, **change})


def test_a_sweep_goes_on_beyond_its_edge():
    """By its own step, to the side where the best rate lies."""
    scores = {1e-4: {0: 0.5}, 2e-4: {0: 0.6}, 4e-4: {0: 0.7}}
    assert beyond(scores, Choice(4e-4, True, None, "")) == 8e-4
    assert beyond(scores, Choice(1e-4, True, None, "")) == 5e-5


def test_a_grid_has_three_digits():
    assert grid(3e-6 / 7, [0.5, 1, 2]) == [2.14e-7, 4.29e-7, 8.57e-7]


# ---- plan and budget


def plan(**changes):
    variants = [Variant(name, {}) for name in ("std", "mean", "loo")]
    return Plan(**{**dict(variants=variants, rates=3, seeds=[0, 1, 2, 3], tuning_seeds=[1000, 1001],
                          placebo_seeds=[1002, 1003], run_seconds=60.0, jobs=2), **changes})  # fmt: skip


def test_the_plan_counts_runs_by_hand():
    """Sweep: 3 rates x (3 methods + the placebo) x 2 seeds; comparison: (3 + 1) x 4 seeds."""
    assert (plan().tuning_runs, plan().comparison_runs, plan().seconds) == (24, 16, 40 * 60 / 2)
    assert (plan(rates=1).tuning_runs, plan(rates=1).comparison_runs) == (0, 12)


def test_the_plan_counts_what_a_sweep_may_add():
    """Two more rates x (3 methods + the placebo) x 2 seeds; the budget counts them."""
    wider = plan(more_rates=2)
    assert (wider.more_runs, wider.runs, wider.most_seconds) == (16, 40, 56 * 60 / 2)
    assert fit(wider, 40 * 60 / 2).dropped
    assert not fit(wider, 56 * 60 / 2).dropped


def test_a_budget_drops_seeds_then_tuning_seeds_then_methods():
    assert fit(plan(), None) == plan()
    assert fit(plan(), 1170.0).dropped == ("seed 3",)
    smaller = fit(plan(), 730.0)
    assert smaller.dropped == ("seed 3", "tuning seed 1001")
    assert smaller.placebo_seeds == [1002]
    assert fit(plan(), 560.0).dropped[-1] == "the method loo"
    with pytest.raises(ValueError, match="--budget is too small: two methods with one seed take"):
        fit(plan(), 60.0)


@pytest.mark.parametrize(("text", "seconds"), [("12h", 43200), ("1.5m", 90), ("2d", 172800), ("30s", 30)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["12", "h", "0h", "-1h", "1w"])
def test_bad_budgets_are_named(text):
    with pytest.raises(ValueError, match="--budget"):
        parse_budget(text)


def test_time_is_predicted_from_timed_steps():
    config = {"max_steps": 100, "eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True}
    timed = Result("finished", config=config, start=20.0, step=2.0, evaluation=3.0)
    assert seconds_of_a_run(timed) == 20 + 200 + 11 * 3


def test_tuning_seeds_are_never_the_comparisons():
    assert tuning_seeds(3, [0, 101]) == [100, 102, 103]


# ---- what is varied


def test_the_fields_names_and_whole_numbers_are_read():
    first, second = make_variants(["rloo", "max_at_k:k=2"], [])
    assert (first.name, first.options["normalization"]) == ("rloo", "loo")
    assert second.options == {"normalization": "max_at_k", "normalization_kwargs": {"k": 2}}


def test_normalisations_and_other_options_are_combined():
    names = [one.name for one in make_variants(["std", "power:alpha=0.5"], ["beta=0,0.01"])]
    assert names == ["std, beta=0", "std, beta=0.01", "power:alpha=0.5, beta=0", "power:alpha=0.5, beta=0.01"]
    last = make_variants(["std", "power:alpha=0.5"], ["beta=0,0.01"])[-1].options
    assert last == {"normalization": "power", "normalization_kwargs": {"alpha": 0.5}, "beta": 0.01}


@pytest.mark.parametrize(
    ("normalizations", "vary", "message"),
    [
        (["std", "grpoo"], [], "--normalization grpoo: unknown normalization"),
        (["std", "power"], [], "needs the option 'alpha'"),
        (["std", "power:alpha"], [], "isn't option=number"),
        (["std", "std"], [], "std: given twice"),
        (["std", "mean", "grpo"], [], "std and grpo: given twice"),
        (["std"], [], "nothing to compare"),
        ([], ["betta=0,1"], "CurvatureGRPOConfig has no option 'betta'"),
        ([], ["beta=x,1"], "beta"),
        ([], ["beta"], "must be option=value,value"),
        ([], ["learning_rate=1,2"], "each run gets its own learning_rate"),
    ],
)
def test_bad_variants_are_named(normalizations, vary, message):
    with pytest.raises(ValueError, match=message):
        make_variants(normalizations, vary)
