"""Rewards of several functions become advantages: by hand, under both aggregations, as TRL's trainers do; metrics."""

import math

import pytest
import torch
from harness import OPTIONS, digits, prompts, short, table, tokenizer_of
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import nanstd

from grpo_kernels import METHODS, normalize_rewards
from trl_ext.advantages.compute import (
    compute_advantages,
    normalization_metrics,
    number_of_states,
    observe_rewards,
    weighted_rewards,
    zero_variance_groups,
)
from trl_ext.advantages.normalization_state import make_state

NAN = float("nan")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def made_and_metrics(rewards, size, method, weights=None, aggregation="sum_then_normalize"):
    """Advantages of groups of this size, and what is logged of them."""
    weights = torch.ones(rewards.shape[1]) if weights is None else weights
    made = compute_advantages(rewards, weights, size, method, {}, aggregation)
    return made, normalization_metrics(rewards, weights, size, aggregation, made)


def test_several_rewards_by_hand():
    """Two prompts, two functions, weights 1 and 2. Function 2 doesn't score the last; nobody scores the fourth."""
    rewards = torch.tensor([[0, 1], [1, 0], [1, 1], [NAN, NAN], [0, 0], [0, 2], [4, 1], [2, NAN]])
    weights = torch.tensor([1.0, 2.0])
    total = weighted_rewards(rewards, weights)
    torch.testing.assert_close(total, torch.tensor([2, 1, 3, NAN, 0, 4, 6, 2]), equal_nan=True)
    mean, metrics = made_and_metrics(rewards, 4, "mean", weights)
    torch.testing.assert_close(mean.advantages.flatten(), torch.tensor([0.0, -1, 1, 0, -3, 1, 3, -1]))

    # each function by itself, centred: means 2/3, 2/3 | 1.5, 1
    each = compute_advantages(rewards, weights, 4, "mean", {}, "normalize_then_sum").advantages.flatten()
    centred = torch.tensor(
        [[-2 / 3, 1 / 3], [1 / 3, -2 / 3], [1 / 3, 1 / 3], [-1.5, -1], [-1.5, 1], [2.5, 0], [0.5, 0]]
    )
    summed = centred @ weights
    whitened = (summed - summed.mean()) / (summed.std() + 1e-4)
    torch.testing.assert_close(each[[0, 1, 2, 4, 5, 6, 7]], whitened)
    assert each[3] == 0
    # group sums (2, 1, 3) and (0, 4, 6, 2): population variances 2/3 and 5
    assert metrics.pop("curvature/sigma_mean") == pytest.approx((math.sqrt(2 / 3) + math.sqrt(5)) / 2)
    expected = dict.fromkeys(("zero_variance_frac", "all_right_frac", "all_wrong_frac", "advantage_mean"), 0.0)
    expected |= {"scale_mean": 1.0, "scale_min": 1.0, "scale_max": 1.0, "centre_mean": 2.5, "centre_max": 3.0}
    expected |= {"unscorable_frac": 0.125, "advantage_abs_mean": 1.25, "advantage_max": 3.0}
    assert metrics == pytest.approx({f"normalization/{name}": value for name, value in expected.items()})


def test_dead_groups_are_right_or_wrong():
    """By the middle of the batch's range; of a batch with one reward by its sign; unscored groups are neither."""
    rewards = torch.tensor([0.0, 0, 1, 1, 0.25, 0.25, 0, 1, NAN, NAN, 2, 2])[:, None]

    def shares(rewards):
        metrics = made_and_metrics(rewards, 2, "mean")[1]
        return [metrics.get(f"normalization/all_{kind}_frac") for kind in ("right", "wrong")]

    assert shares(rewards) == pytest.approx([1 / 6, 3 / 6])  # the middle is 1: only 2 is above it
    assert shares(torch.full((4, 1), 0.5)) == [1.0, 0.0] and shares(torch.zeros(4, 1)) == [0.0, 1.0]
    assert shares(torch.full((4, 1), NAN)) == [None, None]


def test_tiny_denominators_are_seen_and_dead_groups_are_not():
    """Group 1 differs by 1e-3: its std shows as the smallest scale. Group 3 is all equal: left out."""
    rewards = torch.tensor([0.5, 0.5, 0.501, 0.5, 0, 0, 1, 1, 1, 1, 1, 1.0])[:, None]
    metrics = made_and_metrics(rewards, 4, "std")[1]
    assert metrics["normalization/scale_min"] == pytest.approx(0.0005 + 1e-4, rel=1e-3)
    assert metrics["normalization/scale_max"] == pytest.approx(math.sqrt(1 / 3) + 1e-4)
    assert metrics["normalization/zero_variance_frac"] == pytest.approx(1 / 3)
    assert metrics["normalization/centre_max"] == pytest.approx(0.50025)
    assert "normalization/scale_mean" not in made_and_metrics(torch.ones(8, 1), 4, "std")[1]


def unit_rewards(seed: int) -> torch.Tensor:
    """(24, 2): three groups of eight, quarters in [0, 1], some missing, one completion unscored."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 5, (24, 2), generator=generator) / 4
    rewards[3, 1] = rewards[9, 0] = NAN
    rewards[20] = NAN
    return rewards


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pass_at_k"])  # which needs 0 or 1
def test_every_method_under_both_aggregations(method):
    """The sum, or each function, goes to ``normalize_rewards`` as it is, with lengths and what the state knows."""
    rewards, weights = unit_rewards(0), torch.tensor([0.5, 0.5])
    options = {"alpha": 0.5} if method == "power" else {}
    lengths = torch.arange(24.0).view(3, 8)
    for aggregation in AGGREGATIONS:
        states = [make_state(method, options) for _ in range(number_of_states(2, aggregation))]
        observe_rewards(states, rewards, weights, 8, aggregation)
        made = compute_advantages(rewards, weights, 8, method, options, aggregation, states, lengths=lengths)
        inputs = [weighted_rewards(rewards, weights)] if len(states) == 1 else list(rewards.T)
        parts = []
        for column, state in zip(inputs, states, strict=True):
            column_PG = column.view(3, 8)
            context = {**state.context(column_PG), "lengths": lengths}
            if method == "running_std":
                variance = torch.tensor([row[~row.isnan()].var() for row in column_PG]).mean().item()
                assert context["running_variance"] == pytest.approx(variance)
            if method == "decoupled":
                context = {"function_rewards": rewards.view(3, 8, 2), "function_weights": weights}
            parts.append(normalize_rewards(column_PG, method, context=context, **options))
        if aggregation == "sum_then_normalize" or method == "decoupled":
            expected = parts[0]
        else:
            summed = torch.where(rewards.isnan().all(1).view(3, 8), NAN, 0.5 * parts[0] + 0.5 * parts[1])
            expected = (summed - summed.nanmean()) / (nanstd(summed) + 1e-4)
        torch.testing.assert_close(made.advantages, expected.nan_to_num(0.0))
        assert made.advantages[2, 4] == 0
        metrics = normalization_metrics(rewards, weights, 8, aggregation, made)
        assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("seed", range(3))
def test_trls_normalize_then_sum_and_its_rloo(seed):
    """TRL 1.16's lines: ``GRPOTrainer`` with ``normalize_then_sum``, ``RLOOTrainer`` with and without whitening."""
    rewards, weights = unit_rewards(seed), torch.tensor([1.0, 0.25])
    grouped = rewards.view(-1, 8, 2)
    mean_k, std_k = torch.nanmean(grouped, dim=1, keepdim=True), nanstd(grouped, dim=1, keepdim=True)
    total = (((grouped - mean_k) / (std_k + 1e-4)).view(-1, 2) * weights).nansum(dim=1)
    total[rewards.isnan().all(1)] = NAN
    gdpo = ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num(0.0)
    for method, aggregation in [("std", AGGREGATIONS[1]), *(("decoupled", one) for one in AGGREGATIONS)]:
        ours = compute_advantages(rewards, weights, 8, method, {}, aggregation).advantages.flatten()
        torch.testing.assert_close(ours, gdpo, rtol=1e-5, atol=1e-5)

    summed = weighted_rewards(rewards, weights).view(-1, 8)
    counts = (~summed.isnan()).sum(1, keepdim=True)
    rloo = summed - (summed.nansum(1, keepdim=True) - summed) / (counts - 1)
    ours = compute_advantages(rewards, weights, 8, "loo", {}, "sum_then_normalize").advantages
    torch.testing.assert_close(ours, rloo.nan_to_num(0.0), rtol=1e-5, atol=1e-6)


def test_differences_that_cancel_in_the_sum():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = torch.ones(2)
    assert zero_variance_groups(rewards, weights, 2, "sum_then_normalize").tolist() == [True]
    assert zero_variance_groups(rewards, weights, 2, "normalize_then_sum").tolist() == [False]


def test_a_group_is_live_by_function():
    """Function 1 is constant in group 1: its scale there is eps alone, and isn't counted."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [1.0, 4.0]])
    metrics = made_and_metrics(rewards, 2, "std", aggregation="normalize_then_sum")[1]
    h = math.sqrt(0.5)
    assert metrics["normalization/scale_min"] == pytest.approx(h + 1e-4)
    assert metrics["normalization/scale_max"] == pytest.approx(2 * h + 1e-4)
    assert metrics["normalization/scale_mean"] == pytest.approx(4 * h / 3 + 1e-4)


@pytest.mark.parametrize("method", ["max_rl", "beta", "curvature"])
def test_unit_rewards_are_of_the_sum_or_of_each_function(method):
    rewards, weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.5, 2.0])
    states = [make_state(method, {})] * 2
    compute_advantages(rewards, weights, 2, method, {}, "normalize_then_sum", states)  # each is in [0, 1]
    with pytest.raises(ValueError, match=r"rewards_PG\[0, 1\] is 2: normalization"):  # 0.5 * 0 + 2 * 1
        compute_advantages(rewards, weights, 2, method, {}, "sum_then_normalize", states)


@pytest.mark.parametrize("normalize_advantages", [False, True])
def test_the_real_rloo_trainer(normalize_advantages, tiny_policy, tmp_path):
    """Advantages that TRL's ``RLOOTrainer`` made of its own rollouts, from the rewards it logged of them."""
    options = {**OPTIONS, "beta": 0.0, "normalize_advantages": normalize_advantages, "reward_weights": [1.0, 0.5]}
    trainer = RLOOTrainer(
        model=str(tiny_policy),
        reward_funcs=[digits, short],
        args=RLOOConfig(output_dir=str(tmp_path), **options),
        train_dataset=prompts(32),
        processing_class=tokenizer_of(tiny_policy),
    )
    trainer.train()
    rewards = torch.tensor(list(trainer._logs["rewards"].values())).T[-8:]
    theirs = torch.tensor(table(trainer, "advantages"))[-8:]
    assert theirs.abs().max() > 0.1
    ours = compute_advantages(rewards, torch.tensor([1.0, 0.5]), 4, "loo", {}, "sum_then_normalize").advantages
    assert not rewards.isnan().all(1).any()  # digits scores everything
    if normalize_advantages:
        ours = (ours - ours.mean()) / (ours.std() + 1e-4)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-5, atol=1e-6)
