"""The log-linear policy: its gradients against autograd, its samples against their expectation, two steps by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from examples.paper.log_linear import (
    EPS,
    Policies,
    Sampled,
    Setting,
    advantage_table,
    assumptions,
    curvature_along,
    exact_gradient,
    sampled_gradient,
    steps_to,
    train,
)

SMALL = Setting(overlap=0.4, spread=1.5, pass_rate=0.2, noise=0.1, prompts=5, answers=4, shared_features=6)


def states(setting=SMALL, seeds=(3, 4)):
    """Policies of two seeds somewhere in training, (S, R = 1, P, K)."""
    policies = Policies(setting, list(seeds))
    random = np.random.default_rng(0)
    own = random.standard_normal((len(seeds), 1, setting.prompts, setting.features))
    shared = random.standard_normal((len(seeds), 1, setting.shared_features))
    return policies, own, shared, policies.probabilities(own, shared)


def objective(policies, seed, own, shared):
    """Each prompt's expected reward as torch has it, (P,), a function of the parameters."""
    setting = policies.setting
    features = [torch.tensor(part[seed]) for part in (policies.own_SPKD, policies.shared_SPKD, policies.base_SPK)]
    logits = torch.einsum("pkd,pd->pk", features[0], own) + features[1] @ shared + features[2]
    return setting.noise + (1 - 2 * setting.noise) * logits.softmax(-1)[:, 0]


# One state


def test_exact_gradient_is_the_objectives():
    policies, own, shared, pi = states()
    gradients = policies.parameters(exact_gradient("mean", pi, SMALL.noise))
    for seed in range(2):
        parameters = [torch.tensor(part[seed, 0], requires_grad=True) for part in (own, shared)]
        objective(policies, seed, *parameters).sum().backward()
        for found, parameter in zip(gradients, parameters, strict=True):
            np.testing.assert_allclose(found[seed, 0], parameter.grad.numpy(), rtol=1e-10)


@pytest.mark.parametrize("method", ["mean", "std"])
def test_sampled_gradients_tend_to_the_exact(method):
    """Endlessly many answers, here a million: their mean is off by parts in a thousand."""
    _, _, _, pi = states()
    group = 1_000_000
    m = np.arange(group + 1) / group
    scale = 1 / (np.sqrt(m * (1 - m)) + EPS) if method == "std" else 1.0
    table = np.stack([-m * scale, (1 - m) * scale], 1)
    sampled, right = sampled_gradient(table, pi, group, SMALL.noise, np.random.default_rng(1))
    exact = exact_gradient(method, pi, SMALL.noise)
    np.testing.assert_allclose(sampled, exact, atol=0.01 * np.abs(exact).max())
    np.testing.assert_allclose(right / group, SMALL.noise + (1 - 2 * SMALL.noise) * pi[..., 0], atol=0.01)


def test_mean_of_many_small_groups_is_the_gradient_less_its_own_baseline():
    """(r - mean of the group) has expectation (G - 1) / G of the gradient."""
    _, _, _, pi = states(dataclasses.replace(SMALL, prompts=2))
    many = np.repeat(pi, 40_000, 1)
    sampled, _ = sampled_gradient(advantage_table("mean", 4), many, 4, SMALL.noise, np.random.default_rng(2))
    exact = 0.75 * exact_gradient("mean", pi, SMALL.noise)[:, 0]
    np.testing.assert_allclose(sampled.mean(1), exact, atol=0.004)


def test_advantage_tables_by_hand():
    np.testing.assert_allclose(advantage_table("mean", 4)[1], [-0.25, 0.75])
    std = math.sqrt((3 * 0.25**2 + 0.75**2) / 3)
    np.testing.assert_allclose(advantage_table("std", 4)[1], np.array([-0.25, 0.75]) / (std + EPS))
    np.testing.assert_allclose(advantage_table("max_rl", 4)[2], np.array([-0.5, 0.5]) / (0.5 + EPS))
    # on binary rewards ranks are leave-one-out: of one right in four, mid-ranks 2 and 4 of 1 to 4
    ratio = advantage_table("rank", 8)[1:8] / advantage_table("loo", 8)[1:8]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    for method in ("mean", "std", "power", "max_rl", "median_mad", "loo", "rank"):
        table = advantage_table(method, 8)
        assert table[0, 0] == 0 and table[8, 1] == 0  # all wrong, all right: no gradient


def test_curvature_is_the_second_derivative_along_the_gradient():
    policies, own, shared, pi = states()
    gradient = exact_gradient("mean", pi, SMALL.noise)
    own_g = policies.parameters(gradient)[0][:, 0]
    shared_g = np.einsum("spkd,spk->spd", policies.shared_SPKD, gradient[:, 0])
    norms = np.sqrt((own_g**2).sum(-1) + (shared_g**2).sum(-1))[..., None]
    found = curvature_along(pi[:, 0], policies.logits_along(own_g / norms, shared_g / norms), SMALL.noise)
    for seed, prompt in itertools.product(range(2), range(SMALL.prompts)):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        unit_own, unit_shared = (torch.tensor(part[seed, prompt] / norms[seed, prompt]) for part in (own_g, shared_g))
        at_prompt = torch.eye(SMALL.prompts, dtype=torch.float64)[prompt][:, None]
        moved_own = torch.tensor(own[seed, 0]) + t * at_prompt * unit_own
        value = objective(policies, seed, moved_own, torch.tensor(shared[seed, 0]) + t * unit_shared)[prompt]
        (slope,) = torch.autograd.grad(value, t, create_graph=True)
        (second,) = torch.autograd.grad(slope, t)
        assert slope.item() == pytest.approx(norms[seed, prompt, 0])
        assert second.item() == pytest.approx(found[seed, prompt])


def test_assumptions_by_hand():
    """Two prompts, two answers each, features written down: everything can be counted."""
    setting = Setting(overlap=0.5, pass_rate=0.5, prompts=2, answers=2, features=1, shared_features=2)
    policies = Policies(setting, [0])
    policies.own_SPKD = np.array([[[[1.0], [0.0]], [[2.0], [0.0]]]])
    policies.shared_SPKD = np.array([[[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]]])
    pi = np.array([[[0.5, 0.5], [0.2, 0.8]]])
    found = {name: value[0] for name, value in assumptions(policies, pi).items()}
    # raw_p = pi (1 - pi) (phi_right - phi_wrong): 0.25 (1; 1, 0) and 0.16 (2; 1, 1); only the shared part can meet
    inner, norms = 0.25 * 0.16, (0.25 * math.sqrt(2), 0.16 * math.sqrt(6))
    assert found["cos_mean"] == pytest.approx(inner / (norms[0] * norms[1]))
    assert found["cos_std"] == pytest.approx(0) and found["near_orthogonal_frac"] == 0
    assert found["negative_frac"] == found["violated_frac"] == 0
    assert found["r1"] == pytest.approx(norms[1] / norms[0])
    assert found["r2"] == pytest.approx(0.5 / 0.4)
    # S_p has rank one: norm(S_p)^2 = pi (1 - pi) norm(phi)^2; norm(S_p raw_q)^2 = pi (1 - pi) <phi_p, raw_q>^2, shared
    bounds = [0.25 * 0.16**2 / (0.25 * 2 * inner), 0.16 * 0.25**2 / (0.16 * 6 * inner)]
    assert found["m_bound_p95"] == pytest.approx(np.quantile(bounds, 0.95))
    # one direction: J'' = pi (1 - pi) (1 - 2 pi) norm(phi)^2, here 0 and 0.16 * 0.6 * 6
    assert found["curvature_over_sigma"] == pytest.approx(0.16 * 0.6 * 6 / 0.4)
    policies.shared_SPKD[0, 1, 0] = [-1.0, 0.0]
    assert assumptions(policies, pi)["violated_frac"][0] == 1
    policies.shared_SPKD[0, 1, 0] = [0.0, 1.0]  # orthogonal, and S_p raw_q is 0: no violation
    found = {name: value[0] for name, value in assumptions(policies, pi).items()}
    assert found["violated_frac"] == 0 and math.isnan(found["m_bound_p95"])


def test_orthogonal_but_moved_is_a_violation():
    """<raw_p, raw_q> = 0 with S_p raw_q not 0, which three answers can have: one of the two ordered pairs here."""
    setting = Setting(overlap=0.5, pass_rate=1 / 3, prompts=2, answers=3, features=1, shared_features=2)
    policies = Policies(setting, [0])
    policies.own_SPKD = np.ones((1, 2, 3, 1)) * [[[[1.0], [0.0], [0.0]]] * 2]
    policies.shared_SPKD = np.array([[[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]])
    pi = np.full((1, 2, 3), 1 / 3)
    assert assumptions(policies, pi)["violated_frac"][0] == 0.5


def test_solved_prompts_have_no_direction():
    policies, _, _, pi = states()
    pi[:, 0, 0] = [1.0, 0.0, 0.0, 0.0]
    found = assumptions(policies, pi[:, 0])
    assert np.all(found["live"] == 0.8)
    assert all(np.isfinite(values).all() for values in found.values())
    pi[:, 0] = [1.0, 0.0, 0.0, 0.0]
    assert all(np.isnan(assumptions(policies, pi[:, 0])[name]).all() for name in ("cos_std", "r1", "curvature_corr"))


def test_cosines_spread_as_the_docstring_says():
    setting = Setting(overlap=0.8, pass_rate=0.5)
    policies = Policies(setting, [0, 1])
    pi = policies.probabilities(np.zeros((2, 1, 64, 3)), np.zeros((2, 1, 32)))[:, 0]
    assert assumptions(policies, pi)["cos_std"] == pytest.approx(0.8 / math.sqrt(32), rel=0.15)
    assert policies.pass_rates(pi[:, None]).mean() == pytest.approx(0.5)


# Training


def test_two_steps_by_hand():
    setting = dataclasses.replace(SMALL, group=0)
    policies = Policies(setting, [3])
    rates = np.array([[0.0, 2.0]])
    runs = train(policies, "std", rates, 2)
    assert runs.accuracy.shape == (3, 1, 2)
    np.testing.assert_allclose(runs.accuracy[:, 0, 0], runs.accuracy[0, 0, 0])
    parameters = [torch.zeros(5, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)]
    for step in range(3):
        for parameter in parameters:
            parameter.requires_grad_()
        m = objective(policies, 0, *parameters)
        sigma = (m * (1 - m)).sqrt().detach()
        assert runs.sigma[step, 0, 1] == pytest.approx(sigma.mean().item())
        assert runs.accuracy[step, 0, 1] == pytest.approx(((m.mean() - 0.1) / 0.8).item())
        gradients = torch.autograd.grad((m / (sigma + EPS)).sum(), parameters)
        parameters = [(p + 2.0 * g).detach() for p, g in zip(parameters, gradients, strict=True)]


def test_what_a_group_sees():
    policies = Policies(dataclasses.replace(SMALL, group=4, noise=0.0), [3])
    runs = train(policies, "mean", np.zeros((1, 400)), 0)
    m = policies.probabilities(np.zeros((1, 1, 5, 3)), np.zeros((1, 1, 6)))[0, 0, :, 0]
    assert runs.dead.mean() == pytest.approx((m**4 + (1 - m) ** 4).mean(), abs=0.02)
    assert runs.group_sigma.mean() < runs.sigma.mean()  # a small group's std is biased down


def test_steps_to():
    accuracy = np.array([[0.1, 0.6, 0.1], [0.3, 0.7, 0.2], [0.7, 0.8, 0.3]])
    np.testing.assert_allclose(steps_to(accuracy, 0.5), [1.5, 0.0, np.inf])


def test_the_true_sigma_by_hand():
    setting = dataclasses.replace(SMALL, group=4)
    _, _, _, pi = states(setting)
    m = setting.noise + (1 - 2 * setting.noise) * pi[..., 0]
    sigma = np.sqrt(m * (1 - m))
    mean, divided = (Sampled(m, setting, np.random.default_rng(5))(pi, sigma)[0] for m in ("mean", "true_sigma"))
    np.testing.assert_allclose(divided, mean / (sigma + EPS)[..., None])
