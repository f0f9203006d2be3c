"""C and sigma: by hand, without the bias of small groups, across checkpoints."""

import math

import pytest
import torch

from grpo_kernels.interference.speedup_constant import SpeedupConstant, beta_sigma


def seen(*batches):
    constant = SpeedupConstant()
    for rewards in batches:
        constant.observe(torch.tensor(rewards))
    return constant


def test_sigma_of_a_beta_distribution_by_hand():
    """Uniform pass rates: the integral of sqrt(p (1 - p)) is pi / 8. Arcsine ones: 1 / pi."""
    assert beta_sigma(1 / 2, 1 / 3) == pytest.approx(math.pi / 8)
    assert beta_sigma(1 / 2, 3 / 8) == pytest.approx(1 / math.pi)


def test_the_limits_of_equal_and_of_certain_pass_rates():
    assert beta_sigma(0.2, 0.04) == pytest.approx(0.4)
    assert beta_sigma(0.2, 0.04 + 2e-6) == pytest.approx(0.4, abs=1e-3)
    assert beta_sigma(0.3, 0.3) == beta_sigma(0.0, 0.0) == beta_sigma(1.0, 1.0) == 0.0


@pytest.mark.parametrize("answers", [2, 4, 8, 16])
@pytest.mark.parametrize(("rates", "allowed"), [(0.5, 0.03), (0.2, 0.04), (0.05, 0.08), ("beta", 0.04)])
def test_sigma_has_little_of_the_bias_of_small_groups(answers, rates, allowed):
    generator = torch.Generator().manual_seed(0)
    rate_P = torch.full((40_000,), rates) if isinstance(rates, float) else torch.rand(40_000, generator=generator)
    if rates == "beta":  # the arcsine distribution
        rate_P = torch.sin(math.pi / 2 * rate_P).square()
    true = float((rate_P * (1 - rate_P)).sqrt().mean())
    found = []
    for part_P in rate_P.split(320):  # 20 steps of 16 prompts
        constant = SpeedupConstant()
        constant.observe((torch.rand(len(part_P), answers, generator=generator) < part_P[:, None]).float())
        found.append(constant.sigma())
    assert sum(found) / len(found) == pytest.approx(true, rel=allowed)


def test_graded_rewards_keep_the_groups_own_std():
    constant = seen([[0.0, 0.5], [1.0, 1.0]])
    assert constant.sigma() == pytest.approx(0.125)
    assert constant.value() == pytest.approx(1 / 3)


def test_no_constant_outside_zero_and_one_and_before_the_first_pair():
    assert SpeedupConstant().value() is None
    assert seen([[math.nan, 1.0]]).value() is None
    assert seen([[0.1] * 7]).value() is None  # whose mean isn't 0.1 in binary
    assert seen([[1.0, 1.0]]).value() is None and seen([[1.0, 1.0]], [[0.0, 1.0]]).value() is not None
    assert seen([[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 1.0]]).value() is None


def test_rewards_without_groups_are_named():
    with pytest.raises(ValueError, match=r"rewards_PG has shape \(2,\): expected \(P, G\)"):
        seen([0.0, 1.0])


def test_rounding_of_a_sum_is_neither_graded_nor_outside():
    assert seen([[0.0, 1.0 + 1.2e-7]]).value() == seen([[0.0, 1.0]]).value()


def test_unscorable_answers_are_left_out():
    batch = [[0.0, 1.0, math.nan], [1.0, 1.0, 0.0]]
    assert seen(batch).sigma() == pytest.approx(beta_sigma((1 / 2 + 2 / 3) / 2, (0 + 1 / 3) / 2))


def test_its_state_goes_through_a_checkpoint():
    before, after = seen([[0.0, 1.0], [1.0, 1.0]]), SpeedupConstant()
    after.load_state_dict(before.state_dict())
    for one in (before, after):
        one.observe(torch.tensor([[0.0, 0.0]]))
    assert before.value() == after.value()
    after.load_state_dict({"total": 1.0, "steps": 2, "outside": False})
    assert after.value() is None
