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


def test_the_interval_is_the_set_of_ratios_that_the_means_do_not_reject():
    step = StepMoments(0.3, 1.0, 0.0004, 0.0001, 0.0009, errors_needed=4.0)
    found = pooled_alignment([step])
    assert found is not None and found.value == pytest.approx(0.3)
    for end in (found.low, found.high):
        error = (0.0004 - 2 * end * 0.0001 + end**2 * 0.0009) ** 0.5
        assert abs(0.3 - end) / error == pytest.approx(1.96, abs=0.01)


def test_nothing_is_said_where_the_signal_may_be_zero():
    weak = StepMoments(0.3, 1.0, 0.1, 0.0, 0.3**2, errors_needed=4.0)
    assert pooled_alignment([]) is None and pooled_alignment([weak]) is None
    assert pooled_alignment([weak] * 2) is not None  # 4.7 standard errors
    assert pooled_alignment([weak, StepMoments(0.3, 1.0, 0.1, 0.0, 0.3**2, errors_needed=8.0)]) is None


def test_steps_without_moments():
    """Three prompts, and a prompt of one sequence."""
    for prompts in ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3]):
        size = len(prompts)
        step = StepGradients(torch.eye(size), torch.tensor(prompts), torch.rand(size), torch.ones(size), 2)
        assert step_moments(group_by_prompt(step)) is None


def test_the_window_and_its_state():
    pooled, again = PooledAlignment(), PooledAlignment()
    for i in range(WINDOW + 5):
        found = pooled.observe("alignment", StepMoments(0.1 * i, 1.0, 1e-4, 0.0, 1e-4, errors_needed=4.0))
    assert found["interference/alignment"] == pytest.approx(0.1 * (5 + 24) / 2)
    assert pooled.observe("alignment_trained", None) == {}  # each kind of gradients has its own window
    again.load_state_dict(pooled.state_dict())
    assert again.observe("alignment", None) == found


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
    pooled = pooled_alignment([found])
    assert pooled.low < 0.36 * 39 / 40 < pooled.high  # one of 40 is dead
    assert pooled.high - pooled.low < 0.2
    want = raw_groups(planted_step("mean")[0])
    torch.testing.assert_close(raw_groups(groups).gram_PP, want.gram_PP)
    torch.testing.assert_close(raw_groups(groups).trace_P, want.trace_P)


def test_trained_gradients_of_std_have_their_scale_multiplied_back():
    """With a KL penalty or token-level ratios scores aren't known. Up to a factor the moments are those of mean."""
    groups, advantages = planted_step("std")
    name, found = step_alignment(replace(groups, coefficient_B=None), advantages)
    _, want = step_alignment(replace(planted_step("mean")[0], coefficient_B=None), planted_step("mean")[1])
    assert name == "alignment_trained"
    assert pooled_alignment([found]).value == pytest.approx(pooled_alignment([want]).value, rel=1e-6)


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
