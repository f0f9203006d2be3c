"""The pooled alignment of prompts' gradients: its moments by enumeration, its interval on simulated policies."""

from itertools import permutations

import pytest
import torch

from examples.paper.alignment import Cell, simulate
from grpo_kernels.interference.alignment import (
    WINDOW,
    PooledAlignment,
    StepMoments,
    moments,
    pooled_alignment,
    step_moments,
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
    pooled = PooledAlignment()
    for i in range(WINDOW + 5):
        found = pooled.observe(StepMoments(0.1 * i, 1.0, 1e-4, 0.0, 1e-4, errors_needed=4.0))
    assert found is not None and found.value == pytest.approx(0.1 * (5 + 24) / 2)
    again = PooledAlignment()
    again.load_state_dict(pooled.state_dict())
    assert again.observe(None) == found


@pytest.mark.parametrize("cosine", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rates", ["0.2", "half"])
def test_the_interval_holds_the_truth_of_simulated_policies(rates, cosine):
    """400 runs of 20 steps of 16 prompts with 8 answers: 95 % +- 2 standard errors and what the table allows."""
    found = simulate(Cell(8, rates, cosine), repeats=400, seed=1)
    assert found.speaks == 1.0
    assert 0.90 <= found.coverage <= 0.985
    assert found.pooled == pytest.approx(found.truth, abs=0.01)
