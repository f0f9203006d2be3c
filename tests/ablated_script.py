"""A user's training script that knows nothing of ablations: TRL's parser, TRL's trainer, a reward of its own."""

import os
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser


@dataclass
class ScriptArguments:
    """``trouble``: what a script may do that an ablation must find out."""

    trouble: str = ""


def digits(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def questions(count, seed):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i + seed} + 1 ="}] for i in range(count)]})


def make(args, model_name, **others):
    return GRPOTrainer(
        model=model_name,
        reward_funcs=digits,
        args=args,
        train_dataset=questions(16, args.seed),
        eval_dataset=questions(4, 100),
        processing_class=AutoTokenizer.from_pretrained(model_name, padding_side="left"),
        **others,
    )


def from_config(args):
    return make(args, os.environ["ABLATED_POLICY"])


if __name__ == "__main__":
    script, args, model = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
    if script.trouble == "hard-coded":
        args.learning_rate = 1e-3
    trainer = make(args, model.model_name_or_path)
    if script.trouble == "optimizer":
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    if script.trouble == "fails at seed 1" and args.seed == 1:
        raise RuntimeError("the reward model isn't there")
    trainer.train()
