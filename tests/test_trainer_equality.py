"""CurvatureGRPOTrainer against TRL's GRPOTrainer: same seed, same rollouts, real trainer, real (small) model.

A pairwise design: every two settings of any two options occur together in at least one run. Each run trains both
trainers for a few SGD steps and compares advantages, losses, gradients, logged metrics and parameters.
"""

import json

import pytest
import torch
from allpairspy import AllPairs
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.arithmetic import generate_problems

OPTIONS = {
    "loss_type": ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"],
    "beta": [0.0, 0.05],
    "num_iterations": [1, 2],
    # (gradient accumulation, steps per generation)
    "accumulation": [(1, 1), (2, 4), (4, 2)],
    "lora": [False, True],
    "rewards": ["one", "several"],
    "aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "scale_rewards": ["group", "batch", "none"],
    "evaluation": [False, True],
    "fused_loss": [True, False],
    "skip_zero_advantage": [True, False],
    "share_prompts": [False, True],
}
OUR_OPTIONS = ("fused_loss", "skip_zero_advantage", "share_prompts")


DESIGN = [dict(zip(OPTIONS, row, strict=True)) for row in AllPairs(list(OPTIONS.values()))]


def digits(completions, **kwargs):
    """Share of digits, in eighths: exactly representable, and different within most groups."""
    texts = [completion[0]["content"] for completion in completions]
    return [round(8 * sum(c.isdigit() for c in text) / max(len(text), 1)) / 8 for text in texts]


def short(completions, completion_ids, **kwargs):
    """Not scored (None) for every fifth completion."""
    return [None if sum(ids) % 5 == 0 else (1.0 if len(ids) < 6 else 0.25) for ids in completion_ids]


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs, self.gradients = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def prompts(count, split="train"):
    problems = generate_problems(count, split=split)
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": problem.question}] for problem in problems]})


def run(trainer_class, config_class, policy, folder, setting, *, steps=3, resume=None, reward=digits, **extra):
    accumulation, per_generation = setting["accumulation"]
    several = setting["rewards"] == "several"
    config = config_class(
        output_dir=str(folder),
        loss_type=setting["loss_type"],
        beta=setting["beta"],
        num_iterations=setting["num_iterations"],
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        multi_objective_aggregation=setting["aggregation"],
        scale_rewards=setting["scale_rewards"],
        reward_weights=[0.75, 0.5] if several else None,
        num_generations=4,
        num_generations_eval=1,
        per_device_eval_batch_size=8,
        max_completion_length=8,
        max_steps=steps,
        optim="sgd",
        generation_kwargs={"sequence_bias": [[[1], 5.0]]},  # token 1 ends a completion: lengths differ
        lr_scheduler_type="constant",
        eval_strategy="steps" if setting["evaluation"] else "no",
        eval_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=7,
        **{name: setting[name] for name in OUR_OPTIONS if name in setting and config_class is CurvatureGRPOConfig},
        **{
            "use_cpu": True,
            "learning_rate": 0.02,
            "per_device_train_batch_size": 8,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            **extra,
        },
    )
    recorder = Recorder()
    torch.manual_seed(0)
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=[reward, short] if several else reward,
        args=config,
        train_dataset=prompts(64),
        eval_dataset=prompts(8, "held_out") if setting["evaluation"] else None,
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if setting["lora"] else None,
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return trainer, recorder, parameters


TIMINGS = ("runtime", "per_second", "step_time", "total_flos", "epoch", "profiling")


OURS = (
    *("normalization/", "interference/", "what_if/", "noise/", "curvature/", "theory/", "compute/", "phase"),
    *("verdicts/", "completions/repetition"),
)


def norm_of(gradients):
    return sum(g.square().sum() for g in gradients.values()).sqrt()


def assert_same(ours, theirs, *, small_kl=False):
    """``small_kl``: a step whose gradient is the KL penalty's alone, mere rounding, is held to the largest norm."""
    our_trainer, our_record, our_parameters = ours
    their_trainer, their_record, their_parameters = theirs

    assert len(our_record.logs) == len(their_record.logs) > 0
    for our_log, their_log in zip(our_record.logs, their_record.logs, strict=True):
        advantages_clear_of_zero = (
            our_log.get("normalization/zero_variance_frac", 1) == 0
            and our_trainer.multi_objective_aggregation == "sum_then_normalize"
        )
        extra = {key for key in our_log if not key.removeprefix("eval_").startswith(OURS)} - set(their_log)
        left_out = set()
        if "entropy_live" in our_log:  # of what was run, in place of all tokens'
            extra, left_out = extra - {"entropy_live"}, {"entropy"}
        assert not extra and set(their_log) - left_out <= set(our_log)
        for key, value in their_log.items():
            if any(word in key for word in TIMINGS) or key in left_out:
                continue
            if ("cispo_clip_ratio" in key or "vespo/phi_seq" in key) and not advantages_clear_of_zero:
                continue  # they look at an advantage's sign: TRL's residue of an all-equal group has one, and ours is 0
            if value is None or isinstance(value, str):
                assert our_log[key] == value, key
            else:
                # rounding is as large as the terms: luspo sums a sequence's tokens where the others average, and what
                # vespo and cispo sum are log-probs, of about ln V, where the others sum ratios of about 1
                terms = {"luspo": 8, "vespo": 8, "cispo": 8}.get(our_trainer.loss_type, 1)
                assert our_log[key] == pytest.approx(value, rel=1e-5, abs=1e-6 * terms), key
    torch.testing.assert_close(
        torch.tensor(our_trainer._logs["advantages"]),
        torch.tensor(their_trainer._logs["advantages"]),
        rtol=1e-5,
        atol=1e-6,
    )
    assert len(our_record.gradients) == len(their_record.gradients) > 0
    largest = max(norm_of(step) for step in their_record.gradients)
    for our_step, their_step in zip(our_record.gradients, their_record.gradients, strict=True):
        assert our_step.keys() == their_step.keys()
        error = norm_of({name: our_step[name] - gradient for name, gradient in their_step.items()})
        assert error <= 1e-5 * (largest if small_kl else norm_of(their_step))
    for name, value in their_parameters.items():
        torch.testing.assert_close(our_parameters[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_the_design_is_pairwise_and_small():
    assert len(DESIGN) <= 30
    assert {row["loss_type"] for row in DESIGN} == set(OPTIONS["loss_type"])
    names = list(OPTIONS)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            pairs = {(str(row[first]), str(row[second])) for row in DESIGN}
            assert len(pairs) == len(OPTIONS[first]) * len(OPTIONS[second]), (first, second)


@pytest.mark.parametrize("setting", DESIGN, ids=lambda s: "-".join(str(v).replace(" ", "") for v in s.values()))
def test_same_as_trl(setting, tiny_policy, tmp_path):
    theirs = run(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", setting)
    ours = run(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", setting)
    assert_same(ours, theirs)
    trained = [log for log in theirs[1].logs if "grad_norm" in log]
    assert sum(log["grad_norm"] > 0 for log in trained) >= 2, "nothing was trained, so nothing was compared"
    assert any(log.get("completions/max_length", 0) > log.get("completions/min_length", 0) for log in trained)


PLAIN = {name: values[0] for name, values in OPTIONS.items()}


def test_a_plain_grpo_config_does_as_well(tiny_policy, tmp_path):
    theirs = run(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", PLAIN)
    ours = run(CurvatureGRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "ours", PLAIN)
    assert_same(ours, theirs)


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_from_a_checkpoint(lora, tiny_policy, tmp_path):
    """Both go on from TRL's checkpoint, and ours from ours ends where TRL's does."""
    setting = {**PLAIN, "lora": lora, "accumulation": (2, 2), "evaluation": True}
    saving = {"save_strategy": "steps", "save_steps": 2}
    run(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", setting, steps=2, **saving)
    run(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", setting, steps=2, **saving)
    theirs = run(
        GRPOTrainer,
        GRPOConfig,
        tiny_policy,
        tmp_path / "trl",
        setting,
        steps=4,
        resume=str(tmp_path / "trl" / "checkpoint-2"),
    )
    ours = run(
        CurvatureGRPOTrainer,
        CurvatureGRPOConfig,
        tiny_policy,
        tmp_path / "ours",
        setting,
        steps=4,
        resume=str(tmp_path / "ours" / "checkpoint-2"),
    )
    assert ours[0].state.global_step == 4
    assert_same(ours, theirs)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "Curvature-aware GRPO" in card and "2601.23135" in card and "curvature-grpo" in card
    state = json.loads((tmp_path / "ours" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("normalization/zero_variance_frac" in log for log in state["log_history"])
