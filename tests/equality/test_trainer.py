"""What CurvatureGRPOTrainer adds to TRL's: the per-sequence dict, metrics, checks, names."""

import math

import pytest
import torch
from harness import build, by_length, digits, logged, loss_batches, parameters, prompts, table, train

import grpo_kernels
import trl_ext
from grpo_kernels import normalize_rewards
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext._version_check import check_trl_version
from trl_ext.compat import read_loss_settings
from trl_ext.objective import fused
from trl_ext.objective.token_weights import token_weights
from trl_ext.schema import Sequences


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "sapo", "luspo"])
@pytest.mark.parametrize("accumulation", [(1, 1), (2, 4)])
def test_token_weights_are_trls(loss_type, accumulation, tiny_policy, tmp_path):
    """loss = -sum_i w_i len_i A_i / accumulation on policy, where every ratio is 1 (sapo: 2 / temperature)."""
    options = {"gradient_accumulation_steps": accumulation[0], "steps_per_generation": accumulation[1]}
    trainer = build(tiny_policy, tmp_path, loss_type=loss_type, normalization="none", learning_rate=0.0, **options)
    seen = loss_batches(trainer)
    assert len(seen) == 2 * accumulation[0]
    assert len(torch.cat([inputs["completion_mask"].sum(1) for inputs, _ in seen]).unique()) > 1
    for inputs, loss in seen:
        lengths = inputs["completion_mask"].sum(1)
        per_token = inputs["advantages"]
        if loss_type == "sapo":
            positive, negative = trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg
            per_token = per_token * 2 / torch.where(per_token > 0, positive, negative)
        expected = -(inputs["token_weight"] * lengths * per_token).sum() / accumulation[0]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        assert loss.abs() > 1e-3


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_token_weights_of_losses_on_log_probs(loss_type, tiny_policy, tmp_path):
    options = {"normalization": "none", "steps_per_generation": 2, "skip_zero_advantage": False}
    trainer = build(tiny_policy, tmp_path, loss_type=loss_type, **options)
    for inputs, _ in loss_batches(trainer):
        per_generation, items = 2, inputs["num_items_in_batch"].item()
        weights = token_weights(Sequences(inputs), read_loss_settings(trainer), training=True)
        torch.testing.assert_close(weights, torch.full((8,), per_generation / items))


COLUMNS = ("prompt_id", "group_position", "group_rewards", "advantages")


def test_the_dict_knows_its_groups(tiny_policy, tmp_path):
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "skip_zero_advantage": False}
    seen = [inputs for inputs, _ in loss_batches(build(tiny_policy, tmp_path, **options))]
    for pair in zip(seen[::2], seen[1::2], strict=True):
        whole = {name: torch.cat([inputs[name] for inputs in pair]) for name in COLUMNS}
        assert sorted((whole["prompt_id"] * 4 + whole["group_position"]).tolist()) == list(range(16))
        group = whole["group_rewards"]
        own = group.gather(1, whole["group_position"].unsqueeze(1)).squeeze(1)
        mean, std = group.mean(1), group.std(1)
        expected = torch.where(std > 0, (own - mean) / (std + 1e-4), 0.0)
        torch.testing.assert_close(whole["advantages"], expected, rtol=1e-4, atol=1e-5)


def half_dead(completions, **kwargs):
    """The first of two groups: all 0.7; the second: four different rewards."""
    return [0.7] * 4 + [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    "options",
    [{"normalization": "loo"}, {"scale_rewards": "batch"}, {"normalization": "none"}, {"normalization": "global"}],
    ids=str,
)
def test_zero_variance_is_counted_per_group_for_every_method(options, tiny_policy, tmp_path):
    """Trap 5: under a batch statistic, and with a float residue, TRL's own count misses dead groups."""
    trainer = train(tiny_policy, tmp_path, half_dead, max_steps=1, **options)
    assert logged(trainer)[0]["normalization/zero_variance_frac"] == 0.5
    if options == {"normalization": "loo"}:  # the logged table holds our advantages
        mean_of_others = torch.tensor([(1.75 - r) / 3 for r in (0.0, 0.25, 0.5, 1.0)])
        expected = torch.cat([torch.zeros(4), torch.tensor([0.0, 0.25, 0.5, 1.0]) - mean_of_others])
        torch.testing.assert_close(torch.tensor(table(trainer, "advantages")), expected)


def test_the_kernel_gets_rewards_only_where_they_say_everything(tiny_policy, tmp_path, monkeypatch):
    given, choose = [], fused.advantage_inputs

    def keep(*arguments):
        given.append(choose(*arguments))
        return given[-1]

    monkeypatch.setattr(fused, "advantage_inputs", keep)
    methods = ("std", "median_mad", "length_weighted", "rank", "running_std")
    for method in methods:
        train(tiny_policy, tmp_path, normalization=method, max_steps=1)
    of_rewards = {method for method, one in zip(methods, given, strict=True) if one["advantages"] is None}
    assert of_rewards == {"std", "median_mad"} and all(given[methods.index(one)]["rewards"] for one in of_rewards)


@pytest.mark.parametrize("fused_loss", [True, False])
@pytest.mark.parametrize("method", ["median_mad", "iqr", "mean_abs", "max_rl", "loo"])
def test_one_launch_and_advantages_are_the_same_gradient(method, fused_loss, tiny_policy, tmp_path):
    """Rewards normalised inside the loss against a function of one's own that normalises them before."""

    named, own = (
        train(tiny_policy, tmp_path, by_length, normalization=one, fused_loss=fused_loss, max_steps=3).model
        for one in (method, lambda rewards_PG, context: normalize_rewards(rewards_PG, method))
    )
    torch.testing.assert_close(parameters(named), parameters(own), rtol=1e-5, atol=1e-6)


def test_a_function_of_ones_own_sees_the_context(tiny_policy, tmp_path):
    seen = []

    def lengths_alone(rewards_PG, context, weight):
        seen.append(context)
        assert rewards_PG.shape == context["lengths"].shape == (2, 4)
        return weight * (context["lengths"] - context["lengths"].mean(1, keepdim=True))

    options = {"normalization_kwargs": {"weight": 0.5}, "reward_weights": [1.0, 3.0]}
    options |= {"save_strategy": "steps", "save_steps": 1}
    trainer = train(tiny_policy, tmp_path, [digits, digits], prompts(2), normalization=lengths_alone, **options)
    assert [context["function_rewards"].shape for context in seen] == [(2, 4, 2)] * 2
    assert seen[0]["function_weights"].tolist() == [1, 3]
    # two prompts in all: the same two keys at every step
    assert sorted(seen[0]["prompt_keys"].tolist()) == sorted(seen[1]["prompt_keys"].tolist())
    assert len(set(seen[0]["prompt_keys"].tolist())) == 2
    # a function inside a function can't be pickled: the checkpoint's arguments hold its name
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.normalization.endswith("lengths_alone")
    assert trainer.args.to_dict()["normalization"].endswith("lengths_alone")
    assert "normalization/scale_mean" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["normalization/advantage_max"] > 0


def test_rewards_outside_0_1_stop_before_a_step(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, lambda completions, **_: [0.0, 2.0] * 4, normalization="max_rl")
    with pytest.raises(ValueError, match=r"rewards_PG\[0, 1\] is 2: normalization 'max_rl' needs rewards in \[0, 1\]"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_normalization_kwargs_from_a_command_line(tmp_path):
    given = {"normalization": "power", "normalization_kwargs": '{"alpha": 0.25}', "bf16": False, "use_cpu": True}
    config = CurvatureGRPOConfig(output_dir=str(tmp_path), **given)
    assert config.normalization_kwargs == {"alpha": 0.25}


async def slow_and_infinite(completions, **kwargs):
    return [-math.inf] * len(completions)


def returning(value):
    def reward(completions, **kwargs):
        return value

    return reward


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (returning([1.0] * 7), "'reward' returned 7 rewards for 8 completions"),
        (returning([0.0, math.inf, *[1.0] * 6]), "'reward' returned inf for row 1"),
        (returning(["good"] * 8), "'reward' returned 'good' for row 0, not a number$"),
        (returning(1.0), "'reward' returned float, not a list of 8"),
        (slow_and_infinite, "'slow_and_infinite' returned -inf for row 0"),
        (returning([1e39] * 8), r"'reward' returned 1e\+39 for row 0"),
    ],
    ids=["too few", "infinite", "words", "no list", "asynchronous", "beyond float32"],
)
def test_a_failing_reward_function_is_named_before_a_step(function, message, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, [digits, function])
    before = parameters(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    torch.testing.assert_close(parameters(trainer.model), before, rtol=0, atol=0)


def test_public_names():
    trainers = {"CurvatureGRPOConfig", "CurvatureGRPOTrainer", "attach", "fuse_head"}
    assert set(trl_ext.__all__) == trainers | {"read_interference"}
    functions = (
        "check_normalization linear_grpo_loss linear_logprob normalize_rewards normalize_with_statistics use_backend"
    )
    assert set(grpo_kernels.__all__) == {"METHODS", "GRPOLoss", "GradientRecorder", "Normalized", *functions.split()}
    for module in (trl_ext, grpo_kernels):
        for name in module.__all__:
            assert getattr(module, name).__doc__ or isinstance(getattr(module, name), dict), name
    assert CurvatureGRPOTrainer.__name__ == "CurvatureGRPOTrainer"


@pytest.mark.parametrize("version", ["1.9.2", "1.2.0", "0.24.0", "1.9.0.dev0"])
def test_an_older_trl_is_refused(version):
    with pytest.raises(ImportError, match=rf"TRL 1.10 and newer, and TRL {version} is installed: pip"):
        check_trl_version(version)


@pytest.mark.parametrize("version", ["1.10.0", "1.16.9", "1.17.0.dev0", "2.0.0"])
def test_a_newer_trl_is_not(version):
    check_trl_version(version)
