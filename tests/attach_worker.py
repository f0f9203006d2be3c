"""TRL's own trainers of the tiny policy; ``run`` is each process of a run with a recorder attached."""

import torch
from harness import OPTIONS, by_length, prompts, tokenizer_of
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import attach

KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def build(kind, policy, folder, peft_config=None, **options):
    trainer_class, config_class = KINDS[kind]
    given = {**OPTIONS, "gradient_accumulation_steps": 2, **options}
    if kind == "grpo":
        given = {"loss_type": "grpo", **given}
    torch.manual_seed(0)  # adapters are drawn
    return trainer_class(
        model=str(policy),
        reward_funcs=by_length,
        args=config_class(output_dir=str(folder), **given),
        train_dataset=prompts(64),
        processing_class=tokenizer_of(policy),
        peft_config=peft_config,
    )


def run(kind, policy, folder):
    """Two steps of three groups, each in one micro-batch of six answers on each of two processes."""
    options = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 6}
    trainer = build(kind, policy, folder, max_steps=2, **options)
    attach(trainer, every=1, dim=0)
    trainer.train()
