"""Interference and curvature of planted gradients come out as they were planted, in any order and unit."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import bernoulli, gaussian, rollouts, step_of_prompts

from grpo_kernels.interference.metrics import interference_metrics, orthogonality
from grpo_kernels.interference.step_gradients import StepGradients


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: handing each to a pool takes far longer than they do, on a busy machine above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_directional_curvature_leaves_the_own_rollout_out():
    """Scores independent of rewards, pass rates below a half: no correlation. With i in v_i it would be about -0.9."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        rewards, scores = bernoulli(150, 16, generator, 0.0, 0.4), gaussian(150, 16, 200, generator=generator)
        found.append(interference_metrics(rollouts(rewards, scores))["curvature/directional_corr"])
    assert abs(sum(found) / 4) < 0.15


def test_deconvolved_spread_and_rank_recover_the_truth():
    """Cosines with an error of 0.05 added: std and rank come out as of the true ones; conflicts need 2 errors."""
    generator = torch.Generator().manual_seed(1)
    vectors = gaussian(200, 60, generator=generator)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    noise = (gaussian(200, 200, generator=generator) * 0.05).triu(1)
    true = step_of_prompts(vectors)
    noisy = replace(true, gram_BB=true.gram_BB + noise + noise.T)
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

    def chosen(step, rows):
        columns = (step.prompt_B[rows], step.reward_B[rows], step.coefficient_B[rows])
        return StepGradients(step.gram_BB[rows][:, rows], *columns, 4)

    part = chosen(step, keep)
    moved = chosen(part, order)
    numbers = {name: getattr(moved, name).to(dtype) for name in ("reward_B", "coefficient_B")}
    moved = replace(moved, gram_BB=(moved.gram_BB * scale).to(dtype), prompt_B=ids[moved.prompt_B], **numbers)
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
