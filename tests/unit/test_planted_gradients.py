"""Interference and curvature of planted gradients come out as they were planted, in any order and unit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import bernoulli, gaussian, rollouts, step_of

from grpo_kernels.interference.metrics import interference_metrics, orthogonality, signal
from grpo_kernels.interference.step_gradients import StepGradients, group_by_prompt


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: handing each to a pool takes far longer than they do, on a busy machine above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("normalization", ["mean", "none"])
def test_signal_is_unbiased(n, normalization):
    """E[r s] = the planted g; E g_p = (1 - 1/G) g under the group's mean, without the factor 1.11, 1.02 of it."""
    generator = torch.Generator().manual_seed(n)
    dim, prompts = 40, 4000
    truth = gaussian(dim, generator=generator) / dim**0.5
    rewards = bernoulli(prompts, n, generator)
    scores = gaussian(prompts, n, dim, generator=generator) / dim**0.5 + 4 * (rewards - 0.5)[:, :, None] * truth
    step_signal = []
    for chosen in torch.arange(prompts).split(50):
        step_signal.append(signal(group_by_prompt(rollouts(rewards[chosen], scores[chosen], normalization))))
    expected = truth.square().sum() * ((1 - 1 / n) ** 2 if normalization == "mean" else 1)
    measured = torch.cat(step_signal).mean() / expected
    # three standard errors: 0.03 of 4,000 prompts (without the factor 4 rollouts are 0.11 off)
    assert measured == pytest.approx(1.0, abs=0.035)


def test_the_factor_of_the_groups_mean_itself():
    """1 + 1/(G - 1)^2, over every outcome of the rewards: scores +-1 in a direction that rewards alone decide."""
    for n, factor in ((2, 2.0), (4, 1.111), (8, 1.020)):
        outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n)
        step = rollouts(outcomes, (2 * outcomes - 1)[:, :, None])  # a prompt for each outcome, all equally likely
        expected = group_by_prompt(step).gram_PP.diagonal().sqrt().mean() ** 2  # g_p >= 0: E g_p
        assert signal(group_by_prompt(step)).mean() == pytest.approx(expected.item())
        without = StepGradients(step.gram_BB, step.prompt_B, step.reward_B, step.coefficient_B, 0)
        biased = signal(group_by_prompt(without)).mean() / expected
        assert biased.item() == pytest.approx(factor, abs=1e-3)


def test_reliability_and_corrected_cosines_recover_planted_truth():
    """True cosines 0.36. Raw ones are pulled to 0 by rollout noise, by the reliability; corrected ones aren't."""
    generator = torch.Generator().manual_seed(1)
    prompts, n, dim = 40, 8, 4000
    shared = torch.zeros(dim, dtype=torch.float64)
    shared[0] = 0.6
    own = torch.zeros(prompts, dim, dtype=torch.float64)
    own[torch.arange(prompts), torch.arange(prompts) + 1] = 0.8
    rewards = bernoulli(prompts, n, generator)
    noise = gaussian(prompts, n, dim, generator=generator) / dim**0.5 * 2.5
    scores = noise + 4 * (rewards - 0.5)[:, :, None] * (own + shared)[:, None]
    metrics = interference_metrics(rollouts(rewards, scores))
    # of g's noise: E norm^2 of mean of a_i times noise, (1 - 1/G) / 4 / G * 2.5^2, against (1 - 1/G)^2 + spread of r
    assert 0.5 < metrics["interference/reliability"] < 0.9
    attenuated = metrics["interference/cos_mean"] / metrics["interference/reliability"]
    assert attenuated == pytest.approx(0.36, abs=0.03)
    assert metrics["interference/cos_corrected_mean"] == pytest.approx(0.36, abs=0.04)
    assert metrics["interference/cos_mean"] < 0.3


def test_directional_curvature_with_the_own_rollout_in_it_measures_itself():
    """Scores independent of rewards, pass rates below a half: no correlation. With i in v_i: about -0.9, of itself."""
    generator = torch.Generator().manual_seed(0)
    left_out, left_in = [], []
    for _ in range(4):
        rewards, scores = bernoulli(150, 16, generator, 0.0, 0.4), gaussian(150, 16, 200, generator=generator)
        left_out.append(interference_metrics(rollouts(rewards, scores))["curvature/directional_corr"])
        live = rewards.std(1) > 0
        a = (rewards - rewards.mean(1, keepdim=True))[live]
        raw = (a[:, :, None] * scores[live]).sum(1)
        along = (scores[live] * (raw / raw.norm(dim=1, keepdim=True))[:, None]).sum(2)
        kappa = (a * along.square()).mean(1)
        left_in.append(torch.stack([kappa, rewards[live].std(1)]).corrcoef()[0, 1].item())
    assert abs(sum(left_out) / 4) < 0.15
    assert sum(left_in) / 4 < -0.85


def test_deconvolved_spread_and_rank_recover_the_truth():
    """Cosines with an error of 0.05 added: std and rank come out as of the true ones; conflicts need 2 errors."""
    generator = torch.Generator().manual_seed(1)
    vectors = gaussian(200, 60, generator=generator)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    noise = (gaussian(200, 200, generator=generator) * 0.05).triu(1)
    true = step_of(vectors, torch.arange(200), torch.zeros(200), torch.ones(200))
    noisy = StepGradients(true.gram_BB + noise + noise.T, true.prompt_B, true.reward_B, true.coefficient_B, 0)
    truth, raw = interference_metrics(true), interference_metrics(noisy)
    deconvolved = interference_metrics(noisy, sketch_rmse=0.05)
    for name in ("interference/cos_std", "interference/effective_rank"):
        assert deconvolved[name] == pytest.approx(truth[name], rel=0.02)
        assert abs(raw[name] / truth[name] - 1) > 0.05
    assert deconvolved["interference/conflict_frac"] < raw["interference/conflict_frac"] / 2
    assert "interference/cos_std" not in interference_metrics(noisy, sketch_rmse=0.5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["mean", "none"]),
    st.floats(1e-6, 1e6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_order_ids_and_units_do_not_matter(seed, prompts, n, normalization, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    rewards = bernoulli(prompts, n, generator, 0.1, 0.9)
    rewards[torch.rand(prompts, n, generator=generator) < 0.1] = 0.5
    step = rollouts(rewards, gaussian(prompts, n, 7, generator=generator), normalization)
    keep = torch.rand(prompts * n, generator=generator) < 0.8  # parts of groups
    order = torch.randperm(int(keep.sum()), generator=generator)
    ids = torch.randperm(100, generator=generator)[:prompts] - 50

    def chosen(values):
        return values[keep][order]

    part = StepGradients(
        step.gram_BB[keep][:, keep], step.prompt_B[keep], step.reward_B[keep], step.coefficient_B[keep], 4
    )
    moved = StepGradients(
        gram_BB=(part.gram_BB[order][:, order] * scale).to(dtype),
        prompt_B=ids[chosen(step.prompt_B)],
        reward_B=chosen(step.reward_B).to(dtype),
        coefficient_B=chosen(step.coefficient_B).to(dtype),
        baseline_size=4,
    )
    before, after = (interference_metrics(s, sketch_rmse=0.01) for s in (part, moved))
    assert all(math.isfinite(value) for value in before.values())
    assert set(before) == set(after)
    for name, value in before.items():
        unit = scale if name == "curvature/fisher_trace_mean" else 1
        loose = 1e-2 if dtype == torch.float32 else 1e-7
        assert after[name] == pytest.approx(value * unit, rel=loose, abs=loose), name
    if "interference/effective_rank" in before:
        assert 1 - 1e-9 <= before["interference/effective_rank"] <= prompts + 1e-9
        assert -1e-9 <= before["interference/sum_ratio"] <= prompts + 1e-9
    assert orthogonality(part) is None or 0 <= orthogonality(part) <= 1
