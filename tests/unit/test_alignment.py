"""The pooled alignment of prompts' gradients: its moments by enumeration, its interval on simulated policies."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from kernel_inputs import bernoulli, gaussian, rollouts

from examples.paper.alignment import Cell, simulate
from grpo_kernels.interference.alignment import (
    WINDOW,
    PooledAlignment,
    StepMoments,
    moments,
    pooled_alignment,
    raw_groups,
    signal,
    step_alignment,
    step_moments,
    trained_groups,
)
from grpo_kernels.interference.step_gradients import StepGradients, group_by_prompt


def moments_of(cross, cross_variance, covariance, signal_variance):
    return StepMoments(cross, 1.0, cross_variance, covariance, signal_variance, prompts=20.0, errors_needed=4.0)


def test_moments_are_the_means_over_all_tuples_of_different_prompts():
    n, generator = 6, torch.Generator().manual_seed(0)
    half_PP = torch.randn(n, n, dtype=torch.float64, generator=generator)
    k, v = half_PP + half_PP.T, torch.randn(n, dtype=torch.float64, generator=generator)

    def mean(term, prompts):
        tuples = list(permutations(range(n), prompts))
        return sum(term(*one) for one in tuples) / len(tuples)

    none = mean(lambda a, b, c, d: k[a, b] * k[c, d], 4)
    one = mean(lambda a, b, c: k[a, b] * k[a, c], 3)
    both = mean(lambda a, b: k[a, b] ** 2, 2)
    with_own = mean(lambda a, b: k[a, b] * v[a], 2) - mean(lambda a, b, c: k[a, b] * v[c], 3)
    variance = (4 * (n - 2) * (one - none) + 2 * (both - none)) / (n * (n - 1))
    want = [mean(lambda a, b: k[a, b], 2), v.mean(), variance, 2 * with_own / n, v.var() / n]
    torch.testing.assert_close(moments(k, v), torch.stack(want))


@pytest.mark.parametrize("shape", [(3, 3), (5, 4), (4,)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"expected \(\.\.\., P, P\), \(\.\.\., P\), P at least 4"):
        moments(torch.zeros(shape), torch.zeros(shape[-1]))


def test_the_interval_is_the_set_of_ratios_that_the_means_do_not_reject():
    step = moments_of(0.3, 5 * 0.0004, 5 * 0.0001, 5 * 0.0009)
    found = pooled_alignment([step] * 5)
    assert found is not None and found.value == pytest.approx(0.3)
    for end in (found.low, found.high):
        error = (0.0004 - 2 * end * 0.0001 + end**2 * 0.0009) ** 0.5
        assert abs(0.3 - end) / error == pytest.approx(1.96, abs=0.01)


def test_nothing_is_said_where_the_signal_may_be_zero():
    weak = moments_of(0.3, 0.1, 0.0, 0.6**2)
    assert pooled_alignment([]) is None and pooled_alignment([weak] * 5) is None  # 3.7 standard errors
    assert pooled_alignment([weak] * 6) is not None  # 4.1
    assert pooled_alignment([*[weak] * 6, replace(weak, errors_needed=8.0)]) is None


def test_nothing_is_said_of_few_steps_or_prompts_or_without_a_variance():
    step = moments_of(0.3, 0.01, 0.0, 0.01)
    assert pooled_alignment([step] * 4) is None and pooled_alignment([step] * 5) is not None
    assert pooled_alignment([replace(step, prompts=8.0)] * 12) is None
    assert pooled_alignment([replace(step, prompts=8.0)] * 13) is not None
    assert pooled_alignment([replace(step, cross_variance=-0.01)] * 10) is None


def test_prompts_of_one_sequence_are_left_out():
    """Three others are too few for moments; of four they are those without it."""
    generator = torch.Generator().manual_seed(0)

    def found(*prompts):
        size = len(prompts)
        vectors = torch.randn(10, 5, generator=generator.manual_seed(0))[:size]
        step = StepGradients(vectors @ vectors.T, torch.tensor(prompts), torch.ones(size), torch.ones(size), 2)
        return step_moments(group_by_prompt(step))

    assert found(0, 0, 1, 1, 2, 2) is None and found(0, 0, 1, 1, 2, 2, 3) is None
    assert found(0, 0, 1, 1, 2, 2, 3, 3, 4) == found(0, 0, 1, 1, 2, 2, 3, 3)


def test_groups_of_unlike_sizes_each_have_their_own_baseline():
    """True cosine 1: twelve groups of two answers and eight of four."""
    generator = torch.Generator().manual_seed(0)
    cross = signal_ = 0.0
    for _ in range(300):
        sizes = [2] * 12 + [4] * 8
        rewards = torch.rand(sum(sizes), generator=generator).double().round()
        scores = (2 * rewards - 1)[:, None] + 0.3 * gaussian(sum(sizes), 1, generator=generator)
        prompts = torch.arange(20).repeat_interleave(torch.tensor(sizes))
        step = StepGradients(scores @ scores.T, prompts, rewards, torch.ones(len(prompts)), 0)
        found = step_moments(raw_groups(group_by_prompt(step)))
        cross, signal_ = cross + found.cross, signal_ + found.signal
    assert cross / signal_ == pytest.approx(1.0, abs=0.03)


def test_the_window_and_its_state():
    pooled, again = PooledAlignment(), PooledAlignment()
    for i in range(WINDOW + 5):
        found = pooled.observe("alignment", moments_of(0.1 * i, 1e-4, 0.0, 1e-4))
    assert found["interference/alignment"] == pytest.approx(0.1 * (5 + 24) / 2)
    assert pooled.observe("alignment_trained", None) == {}  # each kind of gradients has its own window
    again.load_state_dict(pooled.state_dict())
    latest = moments_of(9.0, 1e-4, 0.0, 1e-4)
    assert pooled.observe("alignment", None) == {}  # a step without moments
    assert again.observe("alignment", latest) == pooled.observe("alignment", latest)
    again.load_state_dict({"alignment": [{"cross": 1.0}]})  # of a version with other moments
    assert again.observe("alignment", latest) == {}


@pytest.mark.parametrize(("n", "factor"), [(2, 2.0), (4, 1.111), (8, 1.020)])
@pytest.mark.parametrize("normalization", ["mean", "none"])
def test_signal_is_unbiased(normalization, n, factor):
    """Over every outcome of the rewards, with scores +-1 in a direction that rewards alone decide. Under the group's
    mean it has the factor 1 + 1/(G - 1)^2."""
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n)
    step = rollouts(outcomes, (2 * outcomes - 1)[:, :, None], normalization)  # a prompt for each, all equally likely
    expected = group_by_prompt(step).gram_PP.diagonal().sqrt().mean() ** 2  # g_p >= 0: E g_p
    assert signal(group_by_prompt(step)).mean() == pytest.approx(expected.item())
    without = signal(group_by_prompt(replace(step, baseline_size=0))).mean() / expected
    assert without.item() == pytest.approx(factor if normalization == "mean" else 1.0, abs=1e-3)


def planted_step(normalization):
    """Prompts of cosine 0.36 and length 1, pass rate a half, and much rollout noise; with the advantages (B,)."""
    generator = torch.Generator().manual_seed(1)
    prompts, n, dim = 40, 8, 4000
    planted = torch.zeros(prompts, dim, dtype=torch.float64)
    planted[:, 0] = 0.6
    planted[torch.arange(prompts), torch.arange(prompts) + 1] = 0.8
    rewards = bernoulli(prompts, n, generator)
    rewards[0] = 1.0  # a dead prompt
    noise = gaussian(prompts, n, dim, generator=generator) / dim**0.5 * 2.5
    step = rollouts(rewards, noise + 4 * (rewards - 0.5)[:, :, None] * planted[:, None], normalization)
    return group_by_prompt(step), step.coefficient_B * n


@pytest.mark.parametrize("normalization", ["mean", "std"])
def test_raw_gradients_recover_planted_alignment_whatever_trained(normalization):
    groups, advantages = planted_step(normalization)
    name, found = step_alignment(groups, advantages)
    assert name == "alignment"
    pooled = pooled_alignment([found] * 5)  # five times the same step: its interval is too narrow, by the root of five
    assert pooled.low - 0.05 < 0.36 * 39 / 40 < pooled.high + 0.05  # one of 40 is dead
    assert pooled.high - pooled.low < 0.1
    want = raw_groups(planted_step("mean")[0])
    torch.testing.assert_close(raw_groups(groups).gram_PP, want.gram_PP)
    torch.testing.assert_close(raw_groups(groups).trace_P, want.trace_P)


def test_trained_gradients_of_std_have_their_scale_multiplied_back():
    """With a KL penalty or token-level ratios scores aren't known. Up to a factor the moments are those of mean."""
    groups, advantages = planted_step("std")
    name, found = step_alignment(replace(groups, coefficient_B=None), advantages)
    _, want = step_alignment(replace(planted_step("mean")[0], coefficient_B=None), planted_step("mean")[1])
    assert name == "alignment_trained"
    assert found.cross / found.signal == pytest.approx(want.cross / want.signal, rel=1e-6)


def test_trained_gradients_stay_where_advantages_are_no_quotient():
    groups, advantages = planted_step("none")
    assert step_alignment(groups, advantages)[0] == "alignment_trained"
    for unknown in (advantages, torch.full_like(advantages, torch.nan)):
        assert trained_groups(groups, unknown) is groups


@pytest.mark.parametrize("cosine", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rates", ["0.2", "half"])
def test_the_interval_holds_the_truth_of_simulated_policies(rates, cosine):
    """400 runs of 20 steps of 16 prompts with 8 answers: 95 % +- 2 standard errors and what the table allows."""
    found = simulate(Cell(8, rates, cosine), repeats=400, seed=1)
    assert found.speaks == 1.0
    assert 0.90 <= found.coverage <= 0.985
    assert found.pooled == pytest.approx(found.truth, abs=0.01)
