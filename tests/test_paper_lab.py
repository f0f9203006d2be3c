"""examples/paper/lab.py: its gradients against autograd, its samples against their expectation, its tables by hand."""

import csv
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import lab
import lab_cells
import lab_results
import log_linear
import numpy as np
import pytest
import torch
from log_linear import (
    EPS,
    EXACT_SCALE,
    Policies,
    Runs,
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

from grpo_kernels.normalize import std_rule

ROOT = Path(__file__).parents[1]
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


def test_scales_of_exact_gradients():
    _, _, _, pi = states()
    m = SMALL.noise + (1 - 2 * SMALL.noise) * pi[..., :1]
    sigma = np.sqrt(m * (1 - m))
    mean = exact_gradient("mean", pi, SMALL.noise)
    for method, scale in {"std": 1 / (sigma + EPS), "power": (sigma + EPS) ** -0.5, "max_rl": 1 / (m + EPS)}.items():
        np.testing.assert_allclose(exact_gradient(method, pi, SMALL.noise), scale * mean)


@pytest.mark.parametrize("method", sorted(EXACT_SCALE))
def test_sampled_gradients_tend_to_the_exact(method):
    """Endlessly many answers, here a million: their mean is off by parts in a thousand."""
    _, _, _, pi = states()
    group = 1_000_000
    sampled, right = sampled_gradient(
        advantage_table_of_shares(method, group), pi, group, SMALL.noise, np.random.default_rng(1)
    )
    exact = exact_gradient(method, pi, SMALL.noise)
    np.testing.assert_allclose(sampled, exact, atol=0.01 * np.abs(exact).max())
    np.testing.assert_allclose(right / group, SMALL.noise + (1 - 2 * SMALL.noise) * pi[..., 0], atol=0.01)


def advantage_table_of_shares(method, group):
    m = np.arange(group + 1) / group
    scale = EXACT_SCALE[method](m, np.sqrt(m * (1 - m)))
    return np.stack([-m * scale, (1 - m) * scale], 1)


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
    own_g, _ = policies.parameters(gradient)
    shared_g = np.einsum("spkd,spk->spd", policies.shared_SPKD, gradient[:, 0])
    norms = np.sqrt((own_g[:, 0] ** 2).sum(-1) + (shared_g**2).sum(-1))[..., None]
    direction = policies.logits_along(own_g[:, 0] / norms, shared_g / norms)
    found = curvature_along(pi[:, 0], direction, SMALL.noise)
    for seed in range(2):
        for prompt in range(SMALL.prompts):
            t = torch.zeros((), dtype=torch.float64, requires_grad=True)
            moved_own = torch.tensor(own[seed, 0])
            step = torch.zeros_like(moved_own)
            step[prompt] = torch.tensor(own_g[seed, 0, prompt] / norms[seed, prompt])
            moved_shared = torch.tensor(shared[seed, 0]) + t * torch.tensor(
                shared_g[seed, prompt] / norms[seed, prompt]
            )
            value = objective(policies, seed, moved_own + t * step, moved_shared)[prompt]
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


# Results


def test_tables_by_hand(tmp_path):
    row = {
        "part": "map",
        **dataclasses.asdict(Setting()),
        "target": 0.5,
        "rate_area": 2.0,
        "edge_steps": False,
        "edge_area": True,
    }
    rows = [
        row
        | {
            "method": "mean",
            "steps": "8 16 8 16",
            "area": "0.5 0.5 0.5 0.5",
            "flow_time": "8 8 inf 8",
            "c_steps": "0.5 0.5 0.5 0.5",
        },
        row
        | {"method": "std", "rate_area": 1.0, "steps": "4 8 4 8", "area": "0.6 0.6 0.6 0.61", "flow_time": "3 3 3 3"},
    ]
    with open(tmp_path / "cells.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (cell,) = lab_cells.read_cells(tmp_path / "cells.csv")
    gain, low, high = cell.area_gain()
    assert gain == pytest.approx(0.1025) and low > 0.09 and high < 0.12
    assert cell.steps_ratio() == pytest.approx(math.log(0.5))
    assert math.isnan(cell.flow_ratio())  # three of four seeds: fewer than 80 %
    cell.rows["mean"]["flow_time"] = np.full(4, 8.0)
    assert cell.flow_ratio() == pytest.approx(0)
    assert lab_results.by_dial([cell])[2] == "| overlap | 0 |  |  | +0.102 (20%) | 1, 0, 1 |"
    cell.rows["std"]["edge_steps"] = True
    assert math.isnan(cell.steps_ratio())


def test_fits():
    x = np.linspace(-1, 0, 30)
    noise = 0.01 * np.sin(40 * x)
    exact = lab_results.fit(x, x + noise)
    assert exact.slope[0] == pytest.approx(1, abs=0.02) and exact.slope[1] < 1 < exact.slope[2]
    assert exact.as_it_is > 0.99
    half = lab_results.fit(x, 0.5 * x + 1 + noise)
    assert half.slope[0] == pytest.approx(0.5, abs=0.02) and half.intercept[0] == pytest.approx(1, abs=0.02)
    assert half.explained > 0.99 and half.as_it_is < 0
    assert lab_results.fit(x[:5], x[:5]) is None
    assert lab_results.rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert lab_results.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert math.isnan(lab_results.rank_correlation(x, np.ones(30)))


def test_the_rule_is_what_the_map_says():
    """grpo_kernels/normalize/std_rule.py holds the map's table, as docs/paper_lab.csv has it."""
    with open(ROOT / "docs" / "paper_lab.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["part"] == "map"]
    edges = lab_results.GAIN_BY_CONSTANT
    for group, gains in zip(std_rule.GROUPS, std_rule.GAIN_GC, strict=True):
        at = [row for row in rows if float(row["group"]) == group]
        assert len(at) == 135
        for low, high, gain in zip(edges, edges[1:], gains, strict=False):
            found = [float(row["gain_std"]) for row in at if low <= float(row["c_start"]) < high]
            assert gain == pytest.approx(np.mean(found) if found else 0.0, abs=6e-4)


def test_the_rule_between_its_places():
    assert [std_rule.std_exponent(c) for c in (0.2, 0.9, 1.0, 1.1, 1.3)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert std_rule.std_gain(0.5, 32) == pytest.approx(0.039)
    assert std_rule.std_gain(0.9, 32) == pytest.approx(0.0165)  # half way from 0.8 to 1.0
    assert std_rule.std_gain(0.5, 16) == pytest.approx(0.0235)  # half way from 8 to 32
    assert std_rule.std_gain(0.1, 512) == pytest.approx(0.060)
    assert std_rule.std_gain(2.0, 2) == pytest.approx(0.0)
    for wrong in (math.nan, -0.1):
        with pytest.raises(ValueError, match="must be a number that is not negative"):
            std_rule.std_exponent(wrong)
    for constant, group in ((math.nan, 8), (-0.1, 8), (0.5, 1)):
        with pytest.raises(ValueError, match=f"group={group}"):
            std_rule.std_gain(constant, group)


def cell_of(gain, *, rate=1.0, area=0.5, methods=("mean", "std"), **setting):
    """A cell whose methods gain 0, ``gain``, 2 ``gain``... over ``mean``, with a little noise between four seeds."""
    noise = np.array([0.0, 1e-4, -1e-4, 0.0])
    rows = {
        name: {
            "area": area + i * (gain + noise),
            "rate_area": rate ** (1 - i),
            "edge_steps": bool(i),
            "edge_area": False,
        }
        for i, name in enumerate(methods)
    }
    return lab_cells.Cell("map", {**dataclasses.asdict(Setting(**setting))}, rows)


def test_constant_at_the_start():
    of = lambda **setting: lab_cells.start_constant(dataclasses.asdict(Setting(**setting)))  # noqa: E731
    assert of(group=2, pass_rate=0.5) == pytest.approx(2 / 3)  # 1/2 where one of two is right: half of the time
    assert of(group=2, pass_rate=0.2, noise=0.1) == pytest.approx(8 / 3 * 0.26 * 0.74)
    assert of(group=0, pass_rate=0.2, noise=0.1) == pytest.approx(8 / 3 * math.sqrt(0.26 * 0.74))
    assert of(group=0, pass_rate=0.5, spread=2.0) < of(group=0, pass_rate=0.5) == pytest.approx(4 / 3)
    policies = Policies(Setting(spread=1.0, pass_rate=0.3, noise=0.1), [0])
    runs = train(policies, "mean", np.zeros((1, 300)), 0)
    assert 8 / 3 * runs.group_sigma.mean() == pytest.approx(of(spread=1.0, pass_rate=0.3, noise=0.1), abs=0.01)


def test_gain_by_constant_by_hand():
    # C: 0.513, 0.667 at G = 2, 1.33 exact
    cells = [cell_of(0.02, group=2, pass_rate=0.2, noise=0.1), cell_of(-0.04, group=2, pass_rate=0.5),
             cell_of(0.01, group=0, pass_rate=0.5)]  # fmt: skip
    head, _, two, endless = lab_results.by_constant(cells)
    assert head == "| answers a prompt | C below 0.7 | C 0.7 to 0.9 | C 0.9 to 1.1 | C 1.1 on |"
    assert two == "| 2 | -0.010 (1, 1 of 2) |  |  |  |"
    assert endless == "| endless |  |  |  | +0.010 (1, 0 of 1) |"


def test_what_explains_the_gain():
    """A gain that is made of one of them is explained by it."""
    settings = [
        {"group": group, "pass_rate": rate, "overlap": overlap}
        for group in (4, 8, 32) for rate in (0.05, 0.1, 0.3, 0.5) for overlap in (0.0, 0.5)
    ]  # fmt: skip
    by_c = [cell_of(0.1 - 0.05 * lab_cells.start_constant(dataclasses.asdict(Setting(**s))), **s) for s in settings]
    shares = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lab_results.explained(by_c)[2:]}
    assert shares["C at the start"] == shares["log2 G, C at the start, their product"] == 1
    assert shares["overlap"] == 0 and shares["log2 G"] < 0.7
    by_overlap = [cell_of(0.05 * (s["overlap"] == 0.5), **s) for s in settings]
    shares = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lab_results.explained(by_overlap)[2:]}
    assert shares["overlap"] == 1 and shares["C at the start"] == 0


def test_best_rates_and_other_methods_by_hand():
    cells = [cell_of(0.01, rate=2.0, group=8), cell_of(0.01, rate=2.0, group=8), cell_of(0.01, rate=4.0, group=0)]
    assert lab_results.rates(cells)[2:] == ["| exact | 1 | 4.00 [4.00, 4.00] | 1, 0 |",
                                            "| sampled | 2 | 2.00 [2.00, 2.00] | 2, 0 |"]  # fmt: skip
    two = [
        cell_of(0.01, methods=("mean", "std", "adaptive"), group=8),
        cell_of(-0.02, methods=("mean", "std", "adaptive")),
    ]
    assert lab_results.methods_table(two)[2:] == ["| `std` | 8 | -0.020, -0.005, +0.010 | 1, 1, 2 |",
                                                  "| `adaptive` | 8 | -0.040, -0.010, +0.020 | 1, 1, 2 |"]  # fmt: skip
    assert "| +0.010 [+0.010, +0.010] |" in lab_results.adaptive_table(two)[2]


SPEED = {2: 0.01, 3: 0.015, 4: 0.05, 8: 0.2}  # accuracy a step at a rate; others learn nothing
CEILING = {2: 1.0, 3: 1.0, 4: 0.9, 8: 0.6}


def test_each_method_at_its_best_rates(monkeypatch):
    """From 0.1 to 0.55, half of the failures: rate 8 is the fastest, 4 has the largest area, 3 the second slowest."""
    asked = []

    def made_up(policies, method, rates, steps, at_step=lambda step, pi: None):
        asked.append((policies.seeds, rates.shape))
        later = 0.0 if policies.seeds == lab.TUNING_SEEDS else 0.01  # the reported seeds start a little higher
        time = np.arange(steps + 1)[:, None, None]
        speed, ceiling = (np.vectorize(lambda r, of=of: of.get(int(r), 0.1))(rates)[None] for of in (SPEED, CEILING))
        accuracy = np.minimum(0.1 + later + np.where(ceiling > 0.1, speed, 0) * time, ceiling)
        column = np.broadcast_to(np.arange(rates.shape[1]), accuracy.shape)
        for step in range(steps + 1):
            at_step(step, np.full((*rates.shape, 2, 2), 100.0 * step) + column[0][..., None, None])
        return Runs(accuracy, 0.1 * (column + 1), 0.05 * (column + 1), 0.3 + 0 * column, 0.4 + 0 * column)

    monkeypatch.setattr(log_linear, "train", made_up)
    monkeypatch.setattr(log_linear, "assumptions", lambda policies, pi: {"seen": pi.mean((1, 2))})
    monkeypatch.setattr(lab, "RATES", np.array([1.0, 2, 3, 4, 8, 16]))
    monkeypatch.setattr(lab, "STEPS", 100)
    policies = [Policies(Setting(prompts=2, answers=2), seeds) for seeds in (lab.TUNING_SEEDS, lab.SEEDS)]
    row = lab.measure_method("mean", *policies)
    assert asked == [(lab.TUNING_SEEDS, (8, 6)), (lab.SEEDS, (20, 3))]
    assert (row["rate_steps"], row["rate_area"], row["rate_slowest"]) == (8, 4, 3)
    assert not row["edge_steps"] and not row["edge_area"]

    def only(name):
        values = {float(value) for value in row[name].split()}
        assert len(values) == 1 and len(row[name].split()) == 20
        return values.pop()

    assert only("steps") == pytest.approx(2 + 0.04 / 0.09, rel=1e-4)  # between 0.51 and the ceiling, 0.6
    assert only("flow_time") == pytest.approx(3 * (0.55 - 0.11) / 0.015, rel=1e-4)
    assert only("final") == 0.9
    curve = np.minimum(0.11 + 0.05 * np.arange(101), 0.9)
    assert only("area") == pytest.approx(curve.mean(), rel=1e-4)
    assert [only(f"c_{name}") for name in ("steps", "area", "slowest")] == pytest.approx(
        [8 / 3 * 0.1 * k for k in (1, 2, 3)], rel=1e-4
    )
    assert only("c_logged_area") == pytest.approx(8 / 3 * 0.1, rel=1e-4)
    assert only("variation_prompts") == 0.3 and only("variation_time") < 1e-12 and only("dead") == 0.4
    # of the slowest run, the third column: at the start, and half way to its 30 steps
    assert only("start_seen") == 2 and only("half_seen") == 1502

    monkeypatch.setattr(lab, "RATES", np.array([2.0, 3, 4, 8]))
    assert lab.measure_method("std", *policies)["edge_steps"]  # the largest rate is the fastest


def test_sampled_with_a_memory_by_hand():
    """adaptive: std while C is small; true_sigma: mean over the sigma that only a laboratory knows."""
    setting = dataclasses.replace(SMALL, group=4)
    _, _, _, pi = states(setting)
    m = setting.noise + (1 - 2 * setting.noise) * pi[..., 0]
    sigma = np.sqrt(m * (1 - m))
    made = {}
    for method in ("mean", "std", "adaptive", "true_sigma"):
        sampled = Sampled(method, setting, np.random.default_rng(5))
        sampled.average = np.full((2, 1), 0.1) if method == "adaptive" else None
        made[method], _ = sampled(pi, sigma)
    np.testing.assert_allclose(made["adaptive"], made["std"], rtol=1e-6)
    np.testing.assert_allclose(made["true_sigma"], made["mean"] / (sigma + EPS)[..., None])
    much = Sampled("adaptive", setting, np.random.default_rng(5))
    much.average = np.full((2, 1), 0.5)
    np.testing.assert_allclose(much(pi, sigma)[0], made["mean"], rtol=1e-6)


def test_no_seed_is_both_tuned_on_and_reported():
    assert not set(lab.TUNING_SEEDS) & set(lab.SEEDS)


def test_command(tmp_path, monkeypatch):
    """As users run it, made short; a second command measures what is missing alone."""
    wanted = [
        ("map", {"overlap": overlap, "group": group, "pass_rate": 0.3, "prompts": 6})
        for overlap in (0.0, 0.5)
        for group in (0, 4)
    ]
    wanted += [("methods", {"group": 4, "prompts": 6}), ("structures", {"features": 0, "prompts": 6})]
    monkeypatch.setattr(lab, "cells", lambda coarse: wanted)
    path = tmp_path / "lab" / "cells.csv"
    path.parent.mkdir()
    lab.write_cells(path, wanted[:2], jobs=1)
    first = path.read_text()
    cut = first.splitlines(keepends=True)[1:3]  # killed in the midst of a setting: mean's row, half of std's
    path.write_text(first + cut[0].replace(",0.0,", ",0.7,", 1) + cut[1].replace(",0.0,", ",0.7,", 1)[:200])
    lab.main(["--output_dir", str(path.parent), "--jobs", "1"])
    assert path.read_text().startswith(first)
    assert {file.name for file in path.parent.iterdir()} == {
        "cells.csv",
        "lab.csv",
        "lab.md",
        "map.png",
        "predictor.png",
    }
    text = (path.parent / "lab.md").read_text()
    assert "`median_mad`" in text and "features = 0" in text
    assert len(lab_cells.read_cells(path)) == len(wanted)


def test_command_line_says_what_is_wrong(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for arguments, message in (
        (["--jobs", "0", "--output_dir", str(tmp_path)], "error: --jobs 0 must be at least 1"),
        (["--output_dir", str(file)], f"error: --output_dir {file} can't be written to: File exists"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples/paper/lab.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1 and done.stderr.strip() == message
