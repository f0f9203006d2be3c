"""Interference and curvature of a step: worked by hand, from planted truth, invariances; the sketch's error; phases."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_inputs import bernoulli, gaussian, rollouts, step_of, step_of_prompts

from grpo_kernels.interference.alignment import signal
from grpo_kernels.interference.curvature import directional_curvature, fisher_trace
from grpo_kernels.interference.metrics import interference_metrics, orthogonality
from grpo_kernels.interference.step_gradients import StepGradients, group_by_prompt

NAN = float("nan")


# ---- by hand


HAND = ("cos_mean", "cos_std", "cos_abs_mean", "conflict_frac", "near_orthogonal_frac", "sum_ratio", "effective_rank")
MEAN = 1.4 / 3  # of the cosines 0.6, 0, 0.8: K = [[1, .6, 0], [.6, 1, .8], [0, .8, 1]]
THREE = (MEAN, math.sqrt((1.0 - 1.4**2 / 3) / 2), MEAN, 0, 1 / 3, 5.8 / 3, 9 / 5)


@pytest.mark.parametrize(
    ("gradients", "expected", "noise_scale"),
    [
        (torch.diag(torch.tensor([1.0, 2.0, 2.0])), (0, 0, 0, 0, 1, 1, 81 / 33), None),
        (torch.ones(4, 3), (1, 0, 1, 0, 0, 4, 1), 0),
        ([[3.0, 0], [-3, 0]], (-1, None, 1, 1, 0, 0, 1), None),
        ([[1.0, 0], [0.6, 0.8], [0, 1]], THREE, (1 - MEAN) / MEAN),
    ],
    ids=["orthogonal", "identical", "opposite", "three"],
)
def test_interference_by_hand(gradients, expected, noise_scale):
    metrics = interference_metrics(step_of_prompts(gradients))
    found = {name.removeprefix("interference/"): value for name, value in metrics.items() if "curvature" not in name}
    wanted = dict(zip((*HAND, "noise_scale"), (*expected, noise_scale), strict=True))
    wanted |= {"live_prompts": float(len(gradients)), "sketch_rmse": 0.0}
    assert found == pytest.approx({name: value for name, value in wanted.items() if value is not None})
    assert metrics["curvature/sigma_mean"] == 0.0


def test_two_prompts_by_hand():
    """Two rollouts each, in an order of no order; prompt 7's scores (1, 0), (0, 2), prompt 3's (1, 1), (0, -1)."""
    scores = torch.tensor([[1.0, 0], [1, 1], [0, 2], [0, -1]])
    coefficients = torch.tensor([0.25, 0.5, -0.25, -0.5])
    rewards = [1.0, 1.0, 0.0, 0.5]
    step = step_of(coefficients[:, None] * scores, [7, 3, 7, 3], rewards, coefficients, baseline_size=2)
    metrics = interference_metrics(step, features_PP=torch.tensor([[2.0, 2.0], [2.0, 4.0]]))
    # trained: g_7 = (0.25, -0.5), g_3 = (0.5, 1).
    cosine = (0.125 - 0.5) / (0.3125 * 1.25) ** 0.5
    # raw: a = +-0.5 and +-0.25, so raw_7 = (0.25, -0.5), raw_3 = (0.125, 0.25); <raw_7, raw_3> < 0
    # kappa: v without i is -+ the other's score. 7: 0. 3: (0.25 (-1)^2 - 0.25 (1 / sqrt 2)^2) / 2
    assert metrics == pytest.approx(
        {
            "interference/live_prompts": 2.0,
            "interference/cos_mean": cosine,
            "interference/cos_abs_mean": -cosine,
            "interference/near_orthogonal_frac": 0.0,
            "interference/conflict_frac": 1.0,
            "interference/sketch_rmse": 0.0,
            "interference/sum_ratio": (0.75**2 + 0.5**2) / 1.5625,
            "interference/effective_rank": 1.5625**2 / (0.3125**2 + 1.25**2 + 2 * 0.375**2),
            "interference/feature_cos_abs_mean": 0.5**0.5,
            "curvature/sigma_mean": (0.5 + 0.25) / 2,
            "curvature/fisher_trace_mean": (2.5 + 1.5) / 2,
            "curvature/fisher_variance_n": 2.0,
            "curvature/directional_n": 2.0,
            "theory/r1": (0.3125 / 0.078125) ** 0.5,
            "theory/r2": 2.0,
            "theory/negative_pairs_frac": 1.0,
        }
    )
    prompts, kappa = directional_curvature(step)
    assert prompts.tolist() == [3, 7]
    assert kappa.tolist() == pytest.approx([(0.25 - 0.25 / 2) / 2, 0.0])
    prompts, trace = fisher_trace(step)
    assert prompts.tolist() == [3, 7] and trace.tolist() == pytest.approx([1.5, 2.5])


def test_a_quotient_of_assumption_4_by_hand():
    """The plain lines of the definition, prompt by prompt, with numpy's spectral norm."""
    generator = torch.Generator().manual_seed(3)
    rewards, scores = bernoulli(5, 4, generator, 0.3, 0.7), gaussian(5, 4, 6, generator=generator) + 0.5
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    metrics = interference_metrics(rollouts(rewards, scores, "std"))
    raw = ((rewards - rewards.mean(1, keepdim=True))[:, :, None] * scores).mean(1)
    bounds, negative = [], 0
    for p in range(5):
        for q in set(range(5)) - {p}:
            if raw[p] @ raw[q] > 0:
                spectral = torch.linalg.matrix_norm(scores[p], ord=2)
                bounds.append(((scores[p] @ raw[q]).norm() ** 2 / (spectral**2 * (raw[p] @ raw[q]))).item())
            else:
                negative += 1
    assert 0 < negative < 20
    assert metrics["theory/m_bound_p95"] == pytest.approx(torch.tensor(bounds).quantile(0.95).item())
    assert metrics["theory/negative_pairs_frac"] == pytest.approx(negative / 20)
    norms = raw.norm(dim=1)
    assert metrics["theory/r1"] == pytest.approx((norms.max() / norms.min()).item())
    # signed curvature along the others' direction
    kappa = []
    for p in range(5):
        a = rewards[p] - rewards[p].mean()
        terms = []
        for i in range(4):
            direction = sum(a[j] * scores[p, j] for j in range(4) if j != i)
            terms.append(a[i] * (scores[p, i] @ direction / direction.norm()) ** 2)
        kappa.append(sum(terms).item() / 4)
    assert directional_curvature(rollouts(rewards, scores, "std"))[1].tolist() == pytest.approx(kappa)
    pair = torch.stack([torch.tensor(kappa, dtype=torch.float64), rewards.std(1, correction=0)])
    assert metrics["curvature/directional_corr"] == pytest.approx(pair.corrcoef()[0, 1].item())
    pair = torch.stack([scores.square().sum(2).mean(1), rewards.var(1, correction=0)])
    assert metrics["curvature/fisher_variance_corr"] == pytest.approx(pair.corrcoef()[0, 1].item())


def test_the_signal_is_the_squared_length_where_contributions_hardly_vary():
    """And below 0 where a prompt's cancel."""
    vectors = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [0.6, 0.8], [2, 1], [-1, 0]])
    step = step_of(vectors, [0, 0, 1, 1, 2, 2], torch.zeros(6), torch.ones(6))
    assert signal(group_by_prompt(step)).tolist() == pytest.approx([4.0, 4.0, -8.0])


# ---- what isn't there


def test_all_equal_groups_have_nothing_to_interfere():
    """0.1 has a mean that isn't 0.1 in float32: sigma must still be 0, and coefficients 0 make a prompt dead."""
    rewards = torch.full((24,), 0.1)
    step = StepGradients(torch.zeros(24, 24), torch.arange(24) // 8, rewards, torch.zeros(24), 8)
    assert interference_metrics(step, sketch_rmse=0.02) == {
        "interference/live_prompts": 0.0,
        "curvature/sigma_mean": 0.0,
        "curvature/fisher_variance_n": 0.0,
        "curvature/directional_n": 0.0,
    }
    assert orthogonality(step) is None
    assert [len(values) for values in (*directional_curvature(step), *fisher_trace(step))] == [0, 0, 0, 0]


def test_one_prompt_and_none():
    step = step_of([[1.0, 0], [0, 1]], [5, 5], [1.0, 0.0], [0.5, -0.5], baseline_size=2)
    metrics = interference_metrics(step)
    assert metrics["interference/sum_ratio"] == metrics["interference/effective_rank"] == 1.0
    assert not {"interference/cos_mean", "interference/noise_scale", "theory/r1"} & set(metrics)
    assert orthogonality(step) is None
    assert interference_metrics(step_of(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), [], [])) == {
        "interference/live_prompts": 0.0,
        "curvature/fisher_variance_n": 0.0,
        "curvature/directional_n": 0.0,
    }


def test_without_coefficients_only_gradients_count():
    """Prompt 2 has no gradient: not live. Everything that is made of gradients alone is as with coefficients."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
    known = rollouts(rewards, gaussian(3, 3, 5, generator=generator))
    unknown = replace(known, coefficient_B=None)
    with_scores, without = interference_metrics(known), interference_metrics(unknown)
    assert without == {name: with_scores[name] for name in without}
    assert {"interference/cos_mean", "theory/r2"} <= set(without)
    of_scores = ("curvature/fisher", "curvature/dir", "theory/r1", "theory/neg")
    assert not any(name.startswith(of_scores) for name in without)
    assert without["interference/live_prompts"] == 2
    assert len(directional_curvature(unknown)[0]) == len(fisher_trace(unknown)[0]) == 0


def test_live_all_equal_groups_of_methods_without_a_group_baseline():
    """``none``: an all-equal group has scores, and so a trace, but no direction; its variance is 0."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    metrics = interference_metrics(rollouts(rewards, gaussian(4, 4, 9, generator=generator), "none"))
    assert metrics["interference/live_prompts"] == 3
    assert metrics["curvature/fisher_variance_n"] == 3
    assert metrics["curvature/directional_n"] == 2


def test_unscorable_and_masked_completions():
    """NaN takes no part. Masked for its length (coefficient 0, but a reward): its reward is in the mean, no score."""
    scores = torch.tensor([[1.0, 0, 0], [0, 1, 0], [5, 5, 5], [5, 5, 5]])
    coefficients = torch.tensor([0.5, -0.5, 0.0, 0.0])
    step = step_of(coefficients[:, None] * scores, [0] * 4, [1.0, 0.0, NAN, 0.5], coefficients, baseline_size=3)
    groups = group_by_prompt(step)
    assert groups.centred_B.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert groups.count_P.tolist() == [3.0]
    assert fisher_trace(step)[1].tolist() == [1.0]
    # a reward at the mean adds a known 0 to raw_p's mean over three
    apart = step_of([[1.0, 0], [0.6, 0.8], [0, 0]], [0] * 3, [1.0, 0.0, 0.5], [1.0, 1.0, 0.0])
    assert directional_curvature(apart)[1].tolist() == pytest.approx([0.0])
    skewed = step_of([[1.0, 0], [0.6, 0.8], [0, 0]], [0] * 3, [1.0, 0.0, 1.0], [1.0, 2.0, 0.0])
    # a = 1/3, -2/3; scores (1, 0), (0.3, 0.4), the third unknown: mean over two
    assert directional_curvature(skewed)[1].tolist() == pytest.approx([(0.36 / 3 - 2 / 3 * 0.09) / 2])


def test_orthogonality():
    """1 for none, 0 for all, whatever the sign; an error of 0.08 alone makes 21% of cosines pass 0.1: corrected for."""
    assert orthogonality(step_of_prompts(torch.eye(4))) == 1.0
    assert orthogonality(step_of_prompts([[1.0, 0], [-1, 0], [1, 0]])) == 0.0
    half = step_of_prompts([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 2]])
    assert orthogonality(half) == pytest.approx(4 / 6)
    generator = torch.Generator().manual_seed(0)
    noise = (gaussian(150, 150, generator=generator) * 0.08).triu(1)
    noisy = replace(step_of_prompts(torch.eye(150)), gram_BB=torch.eye(150) + noise + noise.T)
    assert orthogonality(noisy) == pytest.approx(0.79, abs=0.01)
    assert orthogonality(noisy, sketch_rmse=0.08) == pytest.approx(1.0, abs=0.01)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gram_BB=torch.eye(3) * torch.tensor([1, NAN, 1])), "gram_BB holds a value that isn't finite"),
        (dict(prompt_B=torch.zeros(2, dtype=torch.int64)), r"prompt_B has shape \(2,\): expected \(3,\)"),
        (dict(prompt_B=torch.zeros(3)), "prompt_B is torch.float32: expected int64"),
        (dict(reward_B=torch.zeros(3, 1)), r"reward_B has shape \(3, 1\)"),
        (dict(reward_B=torch.tensor([0, 1, math.inf])), "reward_B holds an infinite value"),
        (dict(coefficient_B=torch.zeros(4)), r"coefficient_B has shape \(4,\)"),
        (dict(coefficient_B=torch.tensor([0, NAN, 1])), "coefficient_B holds a value that isn't finite"),
        (dict(baseline_size=1), "baseline_size=1 must be 0"),
    ],
)
def test_bad_steps_are_named(change, message):
    right = step_of_prompts(torch.eye(3))
    interference_metrics(right)
    with pytest.raises(ValueError, match=message):
        interference_metrics(replace(right, **change))
