"""What CurvatureGRPOTrainer adds to TRL's: the per-sequence dict, metrics, checks, names."""

import math

import pytest
import torch
from datasets import Dataset
from test_trainer_equality import OPTIONS, digits, prompts
from transformers import AutoTokenizer
from trl import GRPOConfig

import trl_ext
from grpo_kernels import normalize_rewards
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext._version_check import check_trl_version


def build(
    policy,
    folder,
    reward_funcs=digits,
    train_dataset=None,
    config_class=CurvatureGRPOConfig,
    peft_config=None,
    rollout_func=None,
    eval_dataset=None,
    **options,
):
    defaults = dict(
        output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=8, max_steps=2,
        optim="sgd", generation_kwargs={"sequence_bias": [[[1], 5.0]]}, learning_rate=0.02, logging_steps=1,
        save_strategy="no", bf16=False, gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    return CurvatureGRPOTrainer(
        model=str(policy),
        reward_funcs=reward_funcs,
        args=config_class(**{**defaults, **options}),
        train_dataset=prompts(32) if train_dataset is None else train_dataset,
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        peft_config=peft_config,
        rollout_func=rollout_func,
        eval_dataset=eval_dataset,
    )


def batches_of(trainer):
    """Every micro-batch the trainer's loss saw, with the loss TRL computed on it."""
    seen = []
    compute = trainer._compute_loss

    def keep(model, inputs):
        loss = compute(model, inputs)
        seen.append((inputs, loss.detach(), trainer.current_gradient_accumulation_steps))
        return loss

    trainer._compute_loss = keep
    trainer.train()
    return seen


@pytest.mark.parametrize("loss_type", [t for t in OPTIONS["loss_type"] if t not in ("cispo", "vespo")])
@pytest.mark.parametrize("accumulation", [(1, 1), (2, 4)])
def test_token_weights_are_trls(loss_type, accumulation, tiny_policy, tmp_path):
    """loss = -sum_i w_i len_i A_i / accumulation on policy, where every ratio is 1 (sapo: 2 / temperature)."""
    trainer = build(
        tiny_policy, tmp_path, loss_type=loss_type, gradient_accumulation_steps=accumulation[0],
        steps_per_generation=accumulation[1], normalization="none", learning_rate=0.0,
    )  # fmt: skip
    seen = batches_of(trainer)
    assert len(seen) == 2 * accumulation[0]
    assert len(torch.cat([inputs["completion_mask"].sum(1) for inputs, _, _ in seen]).unique()) > 1
    for inputs, loss, accumulated in seen:
        lengths = inputs["completion_mask"].sum(1)
        per_token = inputs["advantages"]
        if loss_type == "sapo":
            positive, negative = trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg
            per_token = per_token * 2 / torch.where(per_token > 0, positive, negative)
        expected = -(inputs["token_weight"] * lengths * per_token).sum() / accumulated
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        assert loss.abs() > 1e-3


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_token_weights_of_losses_on_log_probs(loss_type, tiny_policy, tmp_path):
    trainer = build(
        tiny_policy, tmp_path, loss_type=loss_type, normalization="none", steps_per_generation=2,
        skip_zero_advantage=False,
    )  # fmt: skip
    for inputs, _, _ in batches_of(trainer):
        items, processes, per_generation = inputs["num_items_in_batch"], 1, 2
        torch.testing.assert_close(inputs["token_weight"], torch.full((8,), processes * per_generation / items.item()))


def test_the_dict_knows_its_groups(tiny_policy, tmp_path):
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "skip_zero_advantage": False}
    seen = batches_of(build(tiny_policy, tmp_path, **options))
    for pair in zip(seen[::2], seen[1::2], strict=True):
        prompt_id, position = (torch.cat([inputs[n] for inputs, _, _ in pair]) for n in ("prompt_id", "group_position"))
        assert sorted((prompt_id * 4 + position).tolist()) == list(range(16))
        group = torch.cat([inputs["group_rewards"] for inputs, _, _ in pair])
        own = group.gather(1, position.unsqueeze(1)).squeeze(1)
        mean, std = group.mean(1), group.std(1)
        expected = torch.where(std > 0, (own - mean) / (std + 1e-4), 0.0)
        advantages = torch.cat([inputs["advantages"] for inputs, _, _ in pair])
        torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)


def test_logged_table_and_metrics_hold_our_advantages(tiny_policy, tmp_path):
    def half_dead(completions, **kwargs):  # the first of two groups: all 0.7; the second: four different rewards
        return [0.7] * 4 + [0.0, 0.25, 0.5, 1.0]

    trainer = build(tiny_policy, tmp_path, half_dead, normalization="loo", log_completions=False)
    trainer.train()
    logged = torch.tensor(list(trainer._logs["advantages"]))[-8:]
    mean_of_others = torch.tensor([(1.75 - r) / 3 for r in (0.0, 0.25, 0.5, 1.0)])
    torch.testing.assert_close(
        logged, torch.cat([torch.zeros(4), torch.tensor([0.0, 0.25, 0.5, 1.0]) - mean_of_others])
    )
    assert trainer.state.log_history[0]["normalization/zero_variance_frac"] == 0.5


def test_zero_variance_is_counted_per_group_for_every_method(tiny_policy, tmp_path):
    """Trap 5: under a batch statistic, and with a float residue, TRL's own count misses dead groups."""

    def half_dead(completions, **kwargs):
        return [0.7] * 4 + [0.0, 0.25, 0.5, 1.0]

    for options in ({"scale_rewards": "batch"}, {"normalization": "none"}, {"normalization": "global"}):
        trainer = build(tiny_policy, tmp_path, half_dead, **options)
        trainer.train()
        assert trainer.state.log_history[0]["normalization/zero_variance_frac"] == 0.5, options


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
    import trl_ext.objective.fused as fused_loss

    seen = {}
    for method, options in (
        ("std", {}),
        ("median_mad", {}),
        ("length_weighted", {}),
        ("rank", {}),
        ("running_std", {}),
    ):
        build_inputs = fused_loss.rewards_or_advantages

        def keep(settings, inputs, mask_BT, build_inputs=build_inputs, method=method):
            seen[method] = build_inputs(settings, inputs, mask_BT)
            return seen[method]

        with monkeypatch.context() as patch:
            patch.setattr(fused_loss, "rewards_or_advantages", keep)
            build(tiny_policy, tmp_path, normalization=method, normalization_kwargs=options, max_steps=1).train()
    assert {method for method, given in seen.items() if given["advantages"] is None} == {"std", "median_mad"}
    assert all((given["advantages"] is not None) or given["rewards"] for given in seen.values())


@pytest.mark.parametrize("fused_loss", [True, False])
@pytest.mark.parametrize("method", ["median_mad", "iqr", "mean_abs", "max_rl", "loo"])
def test_one_launch_and_advantages_are_the_same_gradient(method, fused_loss, tiny_policy, tmp_path):
    """Rewards normalised inside the loss against a function of one's own that normalises them before."""

    def unit(completion_ids, **kwargs):
        return [(len(ids) % 5) / 4 for ids in completion_ids]

    parameters = {}
    for normalization in (method, lambda rewards_PG, context: normalize_rewards(rewards_PG, method)):
        trainer = build(tiny_policy, tmp_path, unit, normalization=normalization, fused_loss=fused_loss, max_steps=3)
        trainer.train()
        parameters[normalization] = [p.detach() for p in trainer.model.parameters()]
    one, other = parameters.values()
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_function_of_ones_own_sees_the_context(tiny_policy, tmp_path):
    seen = []

    def by_length(rewards_PG, context, weight):
        seen.append(context)
        assert rewards_PG.shape == context["lengths"].shape == (2, 4)
        return weight * (context["lengths"] - context["lengths"].mean(1, keepdim=True))

    trainer = build(
        tiny_policy, tmp_path, [digits, digits], normalization=by_length, normalization_kwargs={"weight": 0.5},
        save_strategy="steps", save_steps=1, train_dataset=prompts(2), reward_weights=[1.0, 3.0],
    )  # fmt: skip
    trainer.train()
    assert [context["function_rewards"].shape for context in seen] == [(2, 4, 2)] * 2
    assert seen[0]["function_weights"].tolist() == [1, 3]
    # two prompts in all: the same two keys at every step
    assert sorted(seen[0]["prompt_keys"].tolist()) == sorted(seen[1]["prompt_keys"].tolist())
    assert len(set(seen[0]["prompt_keys"].tolist())) == 2
    # a function inside a function can't be pickled: the checkpoint's arguments hold its name
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.normalization.endswith("by_length")
    assert trainer.args.to_dict()["normalization"].endswith("by_length")
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
    config = CurvatureGRPOConfig(
        output_dir=str(tmp_path),
        normalization="power",
        normalization_kwargs='{"alpha": 0.25}',
        bf16=False,
        use_cpu=True,
    )
    assert config.normalization_kwargs == {"alpha": 0.25}


def raising(completions, **kwargs):
    raise KeyError("gold")


def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def infinite(completions, **kwargs):
    return [0.0, math.inf, *[1.0] * (len(completions) - 2)]


def words(completions, **kwargs):
    return ["good"] * len(completions)


def not_a_list(completions, **kwargs):
    return 1.0


async def slow_and_infinite(completions, **kwargs):
    return [-math.inf] * len(completions)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raising, RuntimeError, "reward function 'raising' raised KeyError: 'gold'"),
        (too_few, ValueError, "reward function 'too_few' returned 7 rewards for 8 completions"),
        (infinite, ValueError, "reward function 'infinite' returned inf for row 1"),
        (words, ValueError, "reward function 'words' returned 'good' for row 0, not a number"),
        (not_a_list, ValueError, "reward function 'not_a_list' returned float, not a list of 8"),
        (slow_and_infinite, ValueError, "reward function 'slow_and_infinite' returned -inf for row 0"),
    ],
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
    import grpo_kernels

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
    import subprocess
    import sys

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

    trainer = build(tiny_policy, tmp_path, even, Dataset.from_dict({"prompt": ["1 + 1 =", "2 + 2 ="] * 8}))
    trainer.train()
    assert trainer.state.global_step == 2
