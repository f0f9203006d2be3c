"""What a callback changes while training has the effect that it has with TRL, or one warning."""

import ast
import inspect
import textwrap

import pytest
import torch
from harness import NEWEST, build, digits, logged, lora, messages, norm_of, train
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer

WIDE = {"per_device_train_batch_size": 16, "max_steps": 5, "learning_rate": 0.05, "max_grad_norm": 1e9}


def lengths(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def halves(completions, **kwargs):
    return [len(completion[0]["content"]) % 2 / 2 for completion in completions]


class Change(TrainerCallback):
    """Calls ``change(trainer)`` after the second step."""

    def __init__(self, change):
        self.change, self.trainer = change, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.change(self.trainer)


def run(ours, policy, folder, change, **options):
    """(trainer, the norm of each step's gradient)."""
    callback = Change(change)
    options |= {"trainer_class": CurvatureGRPOTrainer if ours else GRPOTrainer, "callbacks": [callback]}
    # evaluated once, at the end: it needs a dataset
    callback.trainer = build(policy, folder, [digits, lengths], **{**WIDE, "eval_strategy": "no", **options})
    callback.trainer.train()
    steps = callback.trainer.recorder.gradients
    return callback.trainer, [float(norm_of({n: g.double() for n, g in step.items()})) for step in steps]


def put(name, value):
    """Sets ``trainer.name``, or ``trainer.args.name`` for "args.name"."""
    *inside, last = name.split(".")
    return lambda trainer: setattr(getattr(trainer, *inside) if inside else trainer, last, value)


def a_third_function(trainer):
    trainer.reward_funcs = [*trainer.reward_funcs, halves]
    trainer.reward_func_names = [*trainer.reward_func_names, "halves"]
    trainer.reward_processing_classes = [*trainer.reward_processing_classes, None]
    trainer.reward_weights = torch.tensor([1.0, 1.0, 2.0])


CHANGES = {
    "scale_rewards none": put("scale_rewards", "none"),
    "scale_rewards batch": put("scale_rewards", "batch"),
    "aggregation": put("multi_objective_aggregation", "normalize_then_sum"),
    "weights": put("reward_weights", torch.tensor([0.2, 3.0])),
    "another function": put("reward_funcs", [halves, lengths]),
    "a third function": a_third_function,
    "beta": put("beta", 0.0),
    "temperature": put("temperature", 0.5),
    "epsilon": put("epsilon_low", 0.01),
    "loss type": put("loss_type", "dr_grpo"),
    "args.delta": put("args.delta", 1.01),
    "args.scale_rewards": put("args.scale_rewards", "none"),
    "args.temperature": put("args.temperature", 0.5),
    "evaluations": put("num_generations_eval", 2),
}


@pytest.fixture(scope="module")
def unchanged(tiny_policy, tmp_path_factory):
    """The norms of the steps' gradients without a change."""
    return run(True, tiny_policy, tmp_path_factory.mktemp("unchanged"), lambda trainer: None)[1]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_has_its_effect_with_trl(name, unchanged, tiny_policy, tmp_path):
    options = {"num_iterations": 2 if name in ("epsilon", "args.delta") else 1, "beta": 0.05 if name == "beta" else 0.0}
    change = CHANGES[name]
    trl, expected = run(False, tiny_policy, tmp_path / "trl", change, **options)
    mine, found = run(True, tiny_policy, tmp_path / "ours", change, **options)
    assert found == pytest.approx(expected, rel=1e-5)
    if name in ("scale_rewards none", "scale_rewards batch", "aggregation", "weights"):  # or it would hold of anything
        assert found[:2] == pytest.approx(unchanged[:2], rel=1e-6) and found[2:] != pytest.approx(
            unchanged[2:], rel=1e-3
        )
    if name == "evaluations":
        rewards = []
        for trainer in (trl, mine):
            torch.manual_seed(1)
            rewards.append(trainer.evaluate()["eval_reward"])
        assert rewards[1] == pytest.approx(rewards[0], rel=1e-5)


def test_what_has_no_effect_is_said_once(tiny_policy, tmp_path, caplog):
    def change(trainer):
        trainer.scale_rewards = "none"
        trainer.args.normalization = "mean"
        trainer.args.interference_every = 1

    run(True, tiny_policy, tmp_path, change, normalization="std")
    assert len(messages(caplog, "scale_rewards='none', set while training, has no effect")) == 1
    assert len(messages(caplog, "interference_every", "normalization", "changed while training")) == 1


def test_a_new_reward_function_is_checked_too(tiny_policy, tmp_path):
    def broken(completions, **kwargs):
        raise KeyError("no such column")

    with pytest.raises(RuntimeError, match="reward function 'digits' raised KeyError"):
        run(True, tiny_policy, tmp_path, put("reward_funcs", [broken, lengths]))


# ---- parameters frozen, unfrozen, swapped, added


def untied(policy, tie=False):
    torch.manual_seed(0)  # an untied head isn't in the folder, and is drawn
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, tie_word_embeddings=tie)


def freeze_head(trainer):
    trainer.model.get_output_embeddings().weight.requires_grad_(False)


def freeze_half(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name)


def frozen(policy):
    model = untied(policy)
    freeze_half(model)
    return model


FREEZING = {
    "default": {},
    "every step": {"interference_every": 1},
    "exact": {"interference_every": 1, "interference_dim": 0},
    "TRL's head": {"interference_every": 1, "fused_loss": False},
}


@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_freezing_the_head_stops_nobody(tied, name, tiny_policy, tmp_path):
    (trl, expected), (mine, found) = (
        run(ours, tiny_policy, tmp_path / str(ours), freeze_head, model=untied(tiny_policy, tied), **FREEZING[name])
        for ours in (False, True)
    )
    assert mine.state.global_step == trl.state.global_step == 5
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (lambda trainer: freeze_half(trainer.model), untied),
        (lambda trainer: trainer.model.requires_grad_(True), frozen),
    ],
    ids=["frozen later", "unfrozen later"],
)
def test_coverage_is_of_what_has_a_gradient_now(change, start, tiny_policy, tmp_path, caplog):
    options = {"model": start(tiny_policy), "interference_every": 1, "interference_dim": 0}
    trainer, _ = run(True, tiny_policy, tmp_path, change, **options)
    logs = logged(trainer, "interference/coverage")
    assert len(logs) == 5
    for entry in logs:
        assert entry["interference/coverage"] == pytest.approx(1, abs=1e-6)
        assert entry["interference/sketch_check"] == pytest.approx(1, abs=1e-3)
    assert len(messages(caplog, "interference records the current ones")) == 1


def test_coverage_is_a_share_of_all_parameters(tiny_policy, tmp_path):
    """Of a sketch of some layers, and where a parameter is unfrozen within a step."""

    class Unfreeze(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model.requires_grad_(True)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            squares = {n: float(p.grad.square().sum()) for n, p in model.named_parameters() if p.grad is not None}
            first = sum(square for name, square in squares.items() if "layers.0" in name)
            self.true = 1 - first / sum(squares.values())

    unfreeze = Unfreeze()
    options = {"gradient_accumulation_steps": 2, "interference_every": 1, "interference_dim": 0, "max_steps": 1}
    options |= {"model": frozen(tiny_policy), "skip_zero_advantage": False, "callbacks": [unfreeze]}
    (entry,) = logged(train(tiny_policy, tmp_path, **options), "interference/coverage")
    assert unfreeze.true < 0.99 and entry["interference/coverage"] == pytest.approx(unfreeze.true, rel=1e-4)


def test_an_adapter_that_is_swapped_is_followed(tiny_policy, tmp_path):
    first, second = (lora(target_modules=[layer], init_lora_weights=False) for layer in ("q_proj", "v_proj"))

    def swap(trainer):
        trainer.model.add_adapter("second", second)
        trainer.model.set_adapter("second")

    options = {"peft_config": first, "interference_every": 1, "interference_dim": 0}
    logs = logged(run(True, tiny_policy, tmp_path, swap, **options)[0])
    assert all(entry["interference/coverage"] > 0.99 for entry in logs) and len(logs) == 5


# ---- what TRL reads

EACH_STEP = (
    *("training_step", "_prepare_inputs", "_calculate_rewards", "_generate", "_generate_and_score_completions"),
    *("_get_per_token_logps_and_entropies", "compute_loss", "_compute_loss", "prediction_step"),
    *("get_off_policy_mask", "get_high_entropy_mask", "get_gamma_weights"),
)
# TRL's settings that these methods read, and what we do with each
READ_BY_TRL = {
    **dict.fromkeys(
        "args.delta args.sapo_temperature_neg args.sapo_temperature_pos args.use_bias_correction_kl "
        "args.steps_per_generation beta entropy_coef epsilon_high epsilon_low importance_sampling_level loss_type "
        "max_completion_length off_policy_mask_threshold router_aux_loss_coef aux_loss_enabled top_entropy_quantile "
        "use_adaptive_entropy vllm_importance_sampling_correction use_vllm".split(),
        "read at each step: read_loss_settings",
    ),
    **dict.fromkeys(
        "scale_rewards multi_objective_aggregation reward_funcs reward_func_names reward_weights num_generations "
        "num_generations_eval".split(),
        "read at each generation: read_reward_settings",
    ),
    **dict.fromkeys(
        "args.report_to args.gradient_checkpointing_kwargs args.per_device_train_batch_size "
        "args.per_device_eval_batch_size args.vespo_k_neg args.vespo_k_pos args.vespo_lambda_neg args.vespo_lambda_pos "
        "args.entropy_target args.entropy_coef_delta args.entropy_coef_min args.entropy_coef_max args.gradient_"
        "accumulation_steps chat_template_kwargs environments environment_factories log_multimodal "
        "mask_truncated_completions num_iterations pad_to_multiple_of reward_processing_classes rollout_func tools "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_mode vllm_mode "
        "vllm_generation eos_token_ids async_loop".split(),
        "TRL's own method reads it, which we call",
    ),
}


def settings_read(method):
    """``self.x`` and ``self.args.x`` that a method loads, where ``x`` is no method."""
    read = {
        ast.unparse(node).removeprefix("self.")
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    names = {name for name in read if name.isidentifier() or name.removeprefix("args.").isidentifier()}
    return {name for name in names if not callable(getattr(GRPOTrainer, name, None))}


# no setting of the user's: what a trainer is made of, and what it counts
STATE = set(
    "accelerator args model model_wrapped ref_model state processing_class _tokenizer _metrics _logs _step "
    "_buffered_inputs _dist current_gradient_accumulation_steps _last_loaded_step _pending_metrics _pending_extra_logs "
    "_entropy_bonus_enabled _last_world_entropy _entropy_window_stats _current_train_step_time _total_train_tokens "
    "_batch_environments _environment_pool _env_tools _multi_environment _sync_tool_dicts _async_tool_dicts "
    "_standalone_tools _has_async_funcs _is_vlm _image_pad_token_id _video_pad_token_id _current_rows".split()
)


@NEWEST
def test_the_list_of_what_trl_reads_is_whole():
    """A setting that TRL begins to read at each step has to be looked at: followed, or TRL's own business."""
    read = set().union(*(settings_read(getattr(GRPOTrainer, name)) for name in EACH_STEP))
    assert read - STATE - set(READ_BY_TRL) == set()


def test_another_group_size_ends_interference_with_a_word(tiny_policy, tmp_path, caplog):
    trainer, _ = run(True, tiny_policy, tmp_path, put("num_generations", 8), interference_every=1)
    assert trainer.state.global_step == 5
    (said,) = messages(caplog, "num_generations=8 was set while training")
    assert "Interference isn't logged from here on" in said
