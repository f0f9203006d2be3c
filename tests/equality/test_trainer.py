"""What CurvatureGRPOTrainer adds to TRL's: the per-sequence dict, metrics, checks, names."""

import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from harness import build, by_length, digits, logged, loss_batches, prompts, table, train
from trl import GRPOConfig

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


def test_logged_table_holds_our_advantages(tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, half_dead, normalization="loo")
    found = torch.tensor(table(trainer, "advantages"))[-8:]
    mean_of_others = torch.tensor([(1.75 - r) / 3 for r in (0.0, 0.25, 0.5, 1.0)])
    expected = torch.cat([torch.zeros(4), torch.tensor([0.0, 0.25, 0.5, 1.0]) - mean_of_others])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options", [{"scale_rewards": "batch"}, {"normalization": "none"}, {"normalization": "global"}], ids=str
)
def test_zero_variance_is_counted_per_group_for_every_method(options, tiny_policy, tmp_path):
    """Trap 5: under a batch statistic, and with a float residue, TRL's own count misses dead groups."""
    trainer = train(tiny_policy, tmp_path, half_dead, max_steps=1, **options)
    assert logged(trainer)[0]["normalization/zero_variance_frac"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "grpo"}, "unknown normalization 'grpo': choose from none, mean, batch_mean, loo, std"),
        (
            {"normalization": "power", "normalization_kwargs": {"alpha": -0.1}},
            r"alpha=-0.1 must be a number in \[0, 1\]",
        ),
        ({"normalization": "power"}, "needs the option 'alpha'"),
        ({"normalization_kwargs": {"alpha": 0.5}}, "'std' has no option 'alpha'"),
        ({"scale_rewards": "prompt"}, "scale_rewards='prompt' must be one of"),
        (
            {"normalization": "running_std", "normalization_kwargs": {"decay": 2}},
            r"decay=2 must be a number in \[0, 1\)",
        ),
        ({"normalization": len}, r"normalization len can't be called with \(rewards_PG, context\)"),
        (
            {"normalization": lambda r, c, eps: r, "normalization_kwargs": {"eps": 1}},
            "eps is for the named methods, not for a function",
        ),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum' must be"),
        ({"per_device_train_batch_size": 6}, r"\(6\) must be divisible by num_generations \(4\)"),
    ],
)
def test_bad_configuration_stops_before_a_model_is_loaded(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "no-model-here", tmp_path, **options)


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

    parameters = {}
    for normalization in (method, lambda rewards_PG, context: normalize_rewards(rewards_PG, method)):
        trainer = train(
            tiny_policy, tmp_path, by_length, normalization=normalization, fused_loss=fused_loss, max_steps=3
        )
        parameters[normalization] = list(trainer.model.parameters())
    one, other = parameters.values()
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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


def test_a_plain_config_is_checked_too(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), scale_rewards="prompt", bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="scale_rewards='prompt'"):
        CurvatureGRPOTrainer(model=str(tmp_path / "none"), reward_funcs=digits, args=args)


def test_normalization_kwargs_from_a_command_line(tmp_path):
    given = {"normalization": "power", "normalization_kwargs": '{"alpha": 0.25}', "bf16": False, "use_cpu": True}
    config = CurvatureGRPOConfig(output_dir=str(tmp_path), **given)
    assert config.normalization_kwargs == {"alpha": 0.25}


def raising(completions, **kwargs):
    raise KeyError("gold")


async def slow_and_infinite(completions, **kwargs):
    return [-math.inf] * len(completions)


def returning(value):
    def reward(completions, **kwargs):
        return value

    return reward


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raising, RuntimeError, "'raising' raised KeyError: 'gold'"),
        (returning([1.0] * 7), ValueError, "'reward' returned 7 rewards for 8 completions"),
        (returning([0.0, math.inf, *[1.0] * 6]), ValueError, "'reward' returned inf for row 1"),
        (returning(["good"] * 8), ValueError, "'reward' returned 'good' for row 0, not a number$"),
        (returning(1.0), ValueError, "'reward' returned float, not a list of 8"),
        (slow_and_infinite, ValueError, "'slow_and_infinite' returned -inf for row 0"),
        (returning([1e39] * 8), ValueError, r"'reward' returned 1e\+39 for row 0"),
    ],
    ids=["raises", "too few", "infinite", "words", "no list", "asynchronous", "beyond float32"],
)
def test_a_failing_reward_function_is_named_before_a_step(function, error, message, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, [digits, function])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_public_names():
    assert set(trl_ext.__all__) == {"CurvatureGRPOConfig", "CurvatureGRPOTrainer", "read_interference"}
    assert set(grpo_kernels.__all__) == {
        "METHODS",
        "GRPOLoss",
        "Normalized",
        "check_normalization",
        "linear_grpo_loss",
        "linear_logprob",
        "normalize_rewards",
        "normalize_with_statistics",
        "use_backend",
    }
    for module in (trl_ext, grpo_kernels):
        for name in module.__all__:
            assert getattr(module, name).__doc__ or isinstance(getattr(module, name), dict), name
    assert CurvatureGRPOTrainer.__name__ == "CurvatureGRPOTrainer"


def test_kernels_never_import_trl_or_transformers():
    code = "import sys, grpo_kernels; print(sorted({'trl', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0", "0.24.0"])
def test_another_trl_is_refused(version):
    with pytest.raises(ImportError, match=rf"TRL 1.15.x or 1.16.x, and TRL {version} is installed"):
        check_trl_version(version)
    check_trl_version("1.15.0")
    check_trl_version("1.16.9")


def test_datasets_of_plain_text_work_too(tiny_policy, tmp_path):
    def even(completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

    trainer = train(tiny_policy, tmp_path, even, Dataset.from_dict({"prompt": ["1 + 1 =", "2 + 2 ="] * 8}))
    assert trainer.state.global_step == 2
