"""The optimizer step of TRL's trainer and of ours on the same stored rollouts; peak memory of one of them.

``step_contenders.py trl|ours LORA DEAD_SHARE...`` prints peak bytes beyond the model of a step with each share, in a
fresh process, after a first step that leaves AdamW's state.

The rollouts: 4 prompts x 4 answers of made-up tokens. Lengths have the spread of GSM8K's in SmolLM2's tokens (log-std
0.36 of questions, 0.45 of answers), but a median of 30 tokens, so that the benchmark ends in time on a CPU, in float32.
On a GPU: a model of Qwen2.5-1.5B's shape with random weights, in bf16 and with gradient checkpointing as TRL has it by
default, 8 prompts x 8 answers, medians of 90 and 148 tokens.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from head_memory import in_use, peak_beyond_now
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.small_policy import build_tokenizer
from trl_ext.tasks.smollm2 import smollm2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS, GENERATIONS, MICRO_BATCHES = (8, 8, 4) if DEVICE == "cuda" else (4, 4, 4)
MODEL = "1.5B" if DEVICE == "cuda" else "SmolLM2"
PROMPT_LOG_MEAN, ANSWER_LOG_MEAN = (4.5, 5.0) if DEVICE == "cuda" else (3.4, 3.4)


def lengths(generator: torch.Generator, count: int, log_mean: float, log_std: float) -> list[int]:
    return (torch.randn(count, generator=generator) * log_std + log_mean).exp().round().int().clamp(8).tolist()


def make_rollouts() -> dict[str, list[list[int]]]:
    """Token ids by prompt: ``prompts`` (PROMPTS), ``completions`` (PROMPTS * GENERATIONS)."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(1000, 40000, (n,), generator=generator).tolist()

    questions = lengths(generator, PROMPTS, PROMPT_LOG_MEAN, 0.36)
    answers = lengths(generator, PROMPTS * GENERATIONS, ANSWER_LOG_MEAN, 0.45)
    return {"prompts": [ids(n) for n in questions], "completions": [ids(n) for n in answers]}


def make_model():
    """What TRL takes as ``model``, and the tokenizer."""
    if DEVICE == "cpu":
        return str(smollm2()), AutoTokenizer.from_pretrained(smollm2(), padding_side="left")
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config)
    tokenizer = build_tokenizer((1, 4))
    tokenizer.padding_side = "left"
    return model, tokenizer


class Clock(TrainerCallback):
    """Seconds of the optimizer steps of a ``train()``, from the first one's begin to the last one's end."""

    seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.start or time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start


class Contender:
    """One trainer; ``step()`` trains on the stored rollouts, for as many optimizer steps as they are used for."""

    def __init__(self, name: str, lora: bool, **options) -> None:
        from peft import LoraConfig

        trainer_class, config_class = {
            "trl": (GRPOTrainer, GRPOConfig),
            "ours": (CurvatureGRPOTrainer, CurvatureGRPOConfig),
        }[name]
        self.dead_share = 0.0
        self.rollouts = make_rollouts()
        self.clock = Clock()
        if name == "ours":
            options = {"interference_every": 0, **options}  # it has a benchmark of its own
        self.options = {"num_iterations": 1, **options}
        model, tokenizer = make_model()
        self.trainer = trainer_class(
            model=model,
            reward_funcs=self.reward,
            args=config_class(
                output_dir=tempfile.mkdtemp(), num_generations=GENERATIONS,
                per_device_train_batch_size=PROMPTS * GENERATIONS // MICRO_BATCHES,
                gradient_accumulation_steps=MICRO_BATCHES, max_steps=self.options["num_iterations"],
                max_completion_length=512,
                learning_rate=0.0,  # nothing moves: all measure the same parameters, and gradients can be compared
                bf16=DEVICE == "cuda", gradient_checkpointing=DEVICE == "cuda",
                shuffle_dataset=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
                use_cpu=DEVICE == "cpu", seed=1, **self.options,
            ),
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]}),
            processing_class=tokenizer,
            rollout_func=self.rollout,
            peft_config=LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0) if lora else None,
            callbacks=[self.clock],
        )  # fmt: skip

    def rollout(self, prompts, trainer):
        row = {i: list(range(i * GENERATIONS, (i + 1) * GENERATIONS)) for i in range(PROMPTS)}
        return {
            "prompt_ids": [self.rollouts["prompts"][int(prompt)] for prompt in prompts],
            "completion_ids": [self.rollouts["completions"][row[int(prompt)].pop(0)] for prompt in prompts],
            "logprobs": None,
        }

    def reward(self, prompts, completion_ids, **kwargs):
        """Of the first ``dead_share`` of the prompts all answers are right; of the others those of odd length."""
        return [
            1.0 if int(prompt) < self.dead_share * PROMPTS else float(place % 2) for place, prompt in enumerate(prompts)
        ]

    def step(self) -> float:
        """Seconds, from old log-probs (where TRL makes them) to the optimizer."""
        self.trainer.train()
        return self.clock.seconds

    def logged(self, name: str) -> float:
        """Of the latest ``train()``'s first step."""
        return next(log[name] for log in self.trainer.state.log_history if name in log)

    @property
    def gradient_norm(self) -> float:
        return self.logged("grad_norm")


def main(name: str, lora: bool, dead_shares: list[float]) -> None:
    contender = Contender(name, lora)
    model_alone = in_use()
    contender.dead_share = max(dead_shares)
    contender.step()
    for contender.dead_share in dead_shares:
        kept = in_use() - model_alone  # AdamW's state
        print("peak", kept + peak_beyond_now(contender.step))


if __name__ == "__main__":
    main(sys.argv[1], bool(int(sys.argv[2])), [float(share) for share in sys.argv[3:]])
