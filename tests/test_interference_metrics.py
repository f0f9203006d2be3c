"""Interference and curvature of a step: worked by hand, from planted truth, invariances; the sketch's error; phases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import step_of

from grpo_kernels.interference.curvature import directional_curvature, fisher_trace
from grpo_kernels.interference.metrics import interference_metrics, orthogonality, signal
from grpo_kernels.interference.step_gradients import StepGradients, group_by_prompt

NAN = float("nan")


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: handing each to a pool takes far longer than they do, on a busy machine above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rollouts(rewards_PG, scores_PGD, normalization="mean") -> StepGradients:
    """A step of whole groups, by its rewards and scores."""
    n_prompts, n = rewards_PG.shape
    advantage_PG = rewards_PG - (0 if normalization == "none" else rewards_PG.mean(1, keepdim=True))
    if normalization == "std":
        advantage_PG = advantage_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)
    vectors = (advantage_PG[:, :, None] / n * scores_PGD).flatten(0, 1)
    prompts = torch.arange(n_prompts).repeat_interleave(n)
    baseline_size = 0 if normalization == "none" else n
    return step_of(vectors, prompts, rewards_PG.flatten(), advantage_PG.flatten() / n, baseline_size)


def bernoulli(n_prompts, n, generator, low=0.5, high=0.5) -> torch.Tensor:
    rate = low + (high - low) * torch.rand(n_prompts, 1, generator=generator, dtype=torch.float64)
    return (torch.rand(n_prompts, n, generator=generator, dtype=torch.float64) < rate).double()


def gaussian(*shape, generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- by hand


def interference_of(gradients, **options) -> dict[str, float]:
    """Of prompts with one sequence each; names without the prefix."""
    step = step_of(gradients, torch.arange(len(gradients)), torch.zeros(len(gradients)), torch.ones(len(gradients)))
    metrics = interference_metrics(step, **options)
    return {name.removeprefix("interference/"): value for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (
            torch.diag(torch.tensor([1.0, 2.0, 2.0])),
            dict(
                cos_mean=0,
                cos_std=0,
                cos_abs_mean=0,
                conflict_frac=0,
                near_orthogonal_frac=1,
                sum_ratio=1,
                effective_rank=81 / 33,
            ),
        ),
        (
            torch.ones(4, 3),
            dict(
                cos_mean=1,
                cos_std=0,
                cos_abs_mean=1,
                conflict_frac=0,
                near_orthogonal_frac=0,
                sum_ratio=4,
                effective_rank=1,
                noise_scale=0,
            ),
        ),
        (
            [[3.0, 0], [-3, 0]],
            dict(cos_mean=-1, cos_abs_mean=1, conflict_frac=1, near_orthogonal_frac=0, sum_ratio=0, effective_rank=1),
        ),
        # cosines 0.6, 0, 0.8; K = [[1, .6, 0], [.6, 1, .8], [0, .8, 1]]
        (
            [[1.0, 0], [0.6, 0.8], [0, 1]],
            dict(
                cos_mean=1.4 / 3,
                cos_abs_mean=1.4 / 3,
                conflict_frac=0,
                cos_std=math.sqrt((1.0 - 1.4**2 / 3) / 2),
                near_orthogonal_frac=1 / 3,
                sum_ratio=5.8 / 3,
                effective_rank=9 / 5,
                noise_scale=(1 - 1.4 / 3) / (1.4 / 3),
            ),
        ),
    ],
    ids=["orthogonal", "identical", "opposite", "three"],
)
def test_interference_by_hand(gradients, expected):
    metrics = interference_of(gradients)
    live = float(len(gradients))
    alone = {"live_prompts": live, "sketch_rmse": 0.0, "curvature/sigma_mean": 0.0}
    curvature = {"curvature/fisher_trace_mean", "curvature/fisher_variance_n", "curvature/directional_n"}
    assert {k: v for k, v in metrics.items() if k not in curvature} == pytest.approx(expected | alone)


def test_two_prompts_by_hand():
    """Two rollouts each, in an order of no order; prompt 7's scores (1, 0), (0, 2), prompt 3's (1, 1), (0, -1)."""
    scores = torch.tensor([[1.0, 0], [1, 1], [0, 2], [0, -1]])
    coefficients = torch.tensor([0.25, 0.5, -0.25, -0.5])
    rewards = [1.0, 1.0, 0.0, 0.5]
    step = step_of(coefficients[:, None] * scores, [7, 3, 7, 3], rewards, coefficients, baseline_size=2)
    metrics = interference_metrics(step, features_PP=torch.tensor([[2.0, 2.0], [2.0, 4.0]]))
    # trained: g_7 = (0.25, -0.5), g_3 = (0.5, 1). V = 2 * 2 u_1 . u_2 / (1 + 1) is 0 for 7, 2 * 0.25 = 0.5 for 3
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
            "interference/reliability": 0.25 / (1.5625 / 2),
            "interference/cos_corrected_left_out": 1.0,
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


def test_corrected_cosines_of_the_expected_gradient():
    """Contributions that hardly vary: V is norm(g)^2, the correction changes nothing. One prompt's cancel: V < 0."""
    vectors = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [0.6, 0.8], [2, 1], [-1, 0]])
    step = step_of(vectors, [0, 0, 1, 1, 2, 2], torch.zeros(6), torch.ones(6))
    assert signal(group_by_prompt(step)).tolist() == pytest.approx([4.0, 4.0, -8.0])
    metrics = interference_metrics(step)
    assert metrics["interference/cos_corrected_mean"] == pytest.approx(0.6)
    assert metrics["interference/cos_corrected_left_out"] == 2
    assert "interference/cos_corrected_std" not in metrics  # of one pair
    assert metrics["interference/reliability"] == pytest.approx(0.0, abs=1e-6)


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
    unknown = StepGradients(known.gram_BB, known.prompt_B, known.reward_B, None, known.baseline_size)
    with_scores, without = interference_metrics(known), interference_metrics(unknown)
    assert without == {name: with_scores[name] for name in without}
    assert {"interference/cos_mean", "interference/reliability", "theory/r2"} <= set(without)
    assert not [
        name for name in without if name.startswith(("curvature/fisher", "curvature/dir", "theory/r1", "theory/neg"))
    ]
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


# ---- planted truth


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


def test_orthogonality():
    """1 for none, 0 for all, whatever the sign; an error of 0.08 alone makes 21% of cosines pass 0.1: corrected for."""
    assert orthogonality(step_of(torch.eye(4), range(4), [0.0] * 4, [1.0] * 4)) == 1.0
    assert orthogonality(step_of([[1.0, 0], [-1, 0], [1, 0]], range(3), [0.0] * 3, [1.0] * 3)) == 0.0
    half = step_of([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 2]], range(4), [0.0] * 4, [1.0] * 4)
    assert orthogonality(half) == pytest.approx(4 / 6)
    generator = torch.Generator().manual_seed(0)
    noise = (gaussian(150, 150, generator=generator) * 0.08).triu(1)
    noisy = StepGradients(torch.eye(150) + noise + noise.T, torch.arange(150), torch.zeros(150), torch.ones(150), 0)
    assert orthogonality(noisy) == pytest.approx(0.79, abs=0.01)
    assert orthogonality(noisy, sketch_rmse=0.08) == pytest.approx(1.0, abs=0.01)


# ---- invariances


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


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gram_BB=torch.zeros(3, 2)), r"gram_BB is torch.float32 \(3, 2\)"),
        (dict(gram_BB=torch.zeros(3, 3, dtype=torch.int64)), "gram_BB is torch.int64"),
        (dict(gram_BB=torch.eye(3) * torch.tensor([1, NAN, 1])), r"gram_BB\[0, 1\] is nan"),
        (dict(gram_BB=torch.eye(3) + torch.ones(3, 3).triu(1)), "gram_BB is not symmetric: .* up to 1"),
        (dict(gram_BB=-torch.eye(3)), "gram_BB has -1 on its diagonal"),
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
    right = dict(
        gram_BB=torch.eye(3),
        prompt_B=torch.arange(3),
        reward_B=torch.zeros(3),
        coefficient_B=torch.ones(3),
        baseline_size=0,
    )
    interference_metrics(StepGradients(**right))
    with pytest.raises(ValueError, match=message):
        interference_metrics(StepGradients(**right | change))


def test_bad_options_are_named():
    step = step_of(torch.eye(2), [0, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="sketch_rmse=nan"):
        interference_metrics(step, sketch_rmse=NAN)
    with pytest.raises(ValueError, match=r"features_PP \(2,\)"):
        interference_metrics(step, features_PP=torch.ones(2))
