"""Every kind of PEFT adapter that TRL takes: the gradient is TRL's, with skipping on and off."""

import peft
import pytest
import torch
from test_trainer_equality import Recorder, digits, prompts
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer

CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = {**CAUSAL, "r": 4, "target_modules": "all-linear"}
ADAPTERS = {
    "LoRA": peft.LoraConfig(**LORA),
    "rsLoRA": peft.LoraConfig(**LORA, use_rslora=True),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "IA3": peft.IA3Config(
        **CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": peft.LoHaConfig(**LORA),
    "VeRA": peft.VeraConfig(**CAUSAL, r=4, target_modules=["q_proj", "v_proj"]),
    "prompt tuning": peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3),
}


class Seeded(TrainerCallback):
    """LoHa draws a number in every forward: as many as there are micro-batches."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def gradients(trainer_class, config_class, policy, folder, adapter, **options):
    """Of two steps of two micro-batches; the adapter isn't at its beginning, where B is 0."""
    config = config_class(
        output_dir=str(folder), num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_completion_length=8, max_steps=2, optim="sgd", learning_rate=0.01, max_grad_norm=0.0, bf16=False,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=3, gradient_checkpointing=False,
        generation_kwargs={"sequence_bias": [[[1], 5.0]]}, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = trainer_class(
        model=str(policy), reward_funcs=digits, args=config, train_dataset=prompts(16), peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(Seeded())
    trainer.train()
    return recorder.gradients


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_gradient_is_trl_s(kind, tiny_policy, tmp_path):
    theirs = gradients(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", ADAPTERS[kind])
    for skipping in (True, False):
        ours = gradients(
            CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / f"ours{skipping}", ADAPTERS[kind],
            skip_zero_advantage=skipping,
        )  # fmt: skip
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.keys() == its.keys() and its
            square = sum((mine[name] - its[name]).square().sum() for name in its)
            assert square.sqrt() <= 1e-5 * sum(one.square().sum() for one in its.values()).sqrt(), (kind, skipping)
