"""The optimizer step of TRL's trainer and of ours on the same stored rollouts; peak memory of one of them.

``step_contenders.py trl|before|ours LORA PROMPT_TOKENS DEAD_SHARE...`` prints peak bytes beyond the model of a step
with each share, in a fresh process, after a first step that leaves AdamW's state. ``before``: ours, with every sequence
in a row of its own.

The rollouts (PROMPT_TOKENS 0): 4 prompts x 4 answers of made-up tokens. Lengths have the spread of GSM8K's in
SmolLM2's tokens (log-std 0.36 of questions, 0.45 of answers), but a median of 30 tokens, so that the benchmark ends in
time on a CPU, in float32. On a GPU: a model of Qwen2.5-1.5B's shape with random weights, in bf16 and with gradient
checkpointing as TRL has it by default, 8 prompts x 8 answers, medians of 90 and 148 tokens.

With PROMPT_TOKENS: prompts of that length, 100 as GSM8K's or 400 as a few examples before each make them, 8 answers to
each, of a median of 115 tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for examples.tasks, where this is run as a script

import torch
from datasets import Dataset
from head_memory import in_use, peak_beyond_now
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.tasks.smollm2 import smollm2
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.small_policy import build_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS, GENERATIONS, MICRO_BATCHES = (8, 8, 4) if DEVICE == "cuda" else (4, 4, 4)
MODEL = "1.5B" if DEVICE == "cuda" else "SmolLM2"
PROMPT_LOG_MEAN, ANSWER_LOG_MEAN = (4.5, 5.0) if DEVICE == "cuda" else (3.4, 3.4)


NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    name: {**dict(zip(NAMES, sizes, strict=True)), "vocab_size": vocabulary}
    for name, sizes, vocabulary in (
        ("0.5B", (896, 4864, 24, 14, 2), 151936),
        ("1.5B", (1536, 8960, 28, 12, 2), 151936),
        ("tiny", (32, 48, 2, 2, 1), 640),
    )
}
CLASSES = {
    "trl": (GRPOTrainer, GRPOConfig),
    "before": (CurvatureGRPOTrainer, CurvatureGRPOConfig),
    "ours": (CurvatureGRPOTrainer, CurvatureGRPOConfig),
}


def lengths(generator: torch.Generator, count: int, log_mean: float, log_std: float) -> list[int]:
    return (torch.randn(count, generator=generator) * log_std + log_mean).exp().round().int().clamp(8).tolist()


@dataclass(frozen=True)
class Rollouts:
    """Token ids by prompt."""

    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def generations(self) -> int:
        return len(self.completions) // len(self.prompts)


def make_rollouts(prompt_tokens: int = 0, vocabulary: tuple[int, int] = (1000, 40000)) -> Rollouts:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(*vocabulary, (n,), generator=generator).tolist()

    generations, answer_log_mean = (8, 4.75) if prompt_tokens else (GENERATIONS, ANSWER_LOG_MEAN)
    questions = [prompt_tokens] * PROMPTS if prompt_tokens else lengths(generator, PROMPTS, PROMPT_LOG_MEAN, 0.36)
    answers = lengths(generator, PROMPTS * generations, answer_log_mean, 0.45)
    return Rollouts([ids(n) for n in questions], [ids(n) for n in answers])


def make_model():
    """What TRL takes as ``model``, and the tokenizer."""
    if DEVICE == "cpu":
        return str(smollm2()), AutoTokenizer.from_pretrained(smollm2(), padding_side="left")
    return random_model("1.5B")


def random_model(name: str):
    """A model of Qwen2.5's shape with random weights in float32, and the built-in tokenizer."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=4096))
    tokenizer = build_tokenizer((1, 4))
    tokenizer.padding_side = "left"
    return model, tokenizer


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(TrainerCallback):
    """Seconds of the optimizer steps of a ``train()``, from the first one's begin to the last one's end."""

    seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.start or time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.seconds = time.perf_counter() - self.start


class Contender:
    """One trainer; ``step()`` trains on the stored rollouts, for as many optimizer steps as they are used for.

    ``model``, a model and its tokenizer, and ``rollouts`` replace the benchmark's own.
    """

    def __init__(
        self, name: str, lora: bool, prompt_tokens: int = 0, *, model=None, rollouts: Rollouts | None = None, **options
    ) -> None:
        trainer_class, config_class = CLASSES[name]
        self.dead_share = 0.0
        self.rollouts = rollouts or make_rollouts(prompt_tokens)
        self.clock = Clock()
        if name != "trl":  # interference has a benchmark of its own
            options = {"interference_every": 0, "share_prompts": name == "ours", **options}
        self.options = {"num_iterations": 1, **options}
        accumulation = self.options.pop("gradient_accumulation_steps", MICRO_BATCHES)
        model, tokenizer = model or make_model()
        self.trainer = trainer_class(
            model=model,
            reward_funcs=self.reward,
            args=config_class(**self.arguments(accumulation)),
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]}),
            processing_class=tokenizer,
            rollout_func=self.rollout,
            peft_config=LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0) if lora else None,
            callbacks=[self.clock],
        )

    def arguments(self, accumulation: int) -> dict[str, object]:
        """Of the configuration."""
        generations, on_gpu = self.rollouts.generations, DEVICE == "cuda"
        return {
            "output_dir": tempfile.mkdtemp(),
            "num_generations": generations,
            "per_device_train_batch_size": PROMPTS * generations // MICRO_BATCHES,
            "gradient_accumulation_steps": accumulation,
            "max_steps": self.options["num_iterations"] * MICRO_BATCHES // accumulation,
            "max_completion_length": 512,
            "learning_rate": 0.0,  # nothing moves: all measure the same parameters, and gradients can be compared
            **dict.fromkeys(["bf16", "gradient_checkpointing"], on_gpu),
            **{"use_cpu": not on_gpu, "shuffle_dataset": False, "disable_tqdm": True, "seed": 1},
            **{"report_to": "none", "save_strategy": "no", "logging_steps": 1},
            **self.options,
        }

    def rollout(self, prompts, trainer):
        of_prompt = self.rollouts.generations
        row = {i: list(range(i * of_prompt, (i + 1) * of_prompt)) for i in range(PROMPTS)}
        return {
            "prompt_ids": [self.rollouts.prompts[int(prompt)] for prompt in prompts],
            "completion_ids": [self.rollouts.completions[row[int(prompt)].pop(0)] for prompt in prompts],
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

    def floor_seconds(self) -> float:
        """The matrix products of packed tokens alone, each prompt once, of what has a gradient: of the backbone's
        layers forward and backward, and of the head for answers."""
        first = round(self.dead_share * PROMPTS)
        answers = self.rollouts.completions[first * self.rollouts.generations :]
        live = sum(map(len, answers))
        packed = live + sum(map(len, self.rollouts.prompts[first:]))
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        shapes = {(layer.in_features, layer.out_features, layer.weight.requires_grad) for layer in layers}
        tensors = {}
        for n_in, n_out, _ in shapes:
            tokens = live if n_out == model.config.vocab_size else packed
            sizes = (tokens, n_in), (tokens, n_out), (n_out, n_in)
            tensors[n_in, n_out] = [torch.randn(*size, device=DEVICE, dtype=dtype) for size in sizes]
        wait()
        start = time.perf_counter()
        for layer in layers:
            x, y, weight = tensors[layer.in_features, layer.out_features]
            x @ weight.T
            y @ weight
            if layer.weight.requires_grad:
                y.T @ x
        wait()
        return time.perf_counter() - start

    @property
    def gradient_norm(self) -> float:
        return self.logged("grad_norm")


def peaks_of(name: str, lora: bool, prompt_tokens: int, dead_shares: Iterable[float]) -> list[int]:
    """Runs this file in a fresh process, and returns the peak bytes of a step with each share of dead groups."""
    command = [sys.executable, __file__, name, str(int(lora)), str(prompt_tokens), *map(str, dead_shares)]
    # glibc gives freed memory back at once: resident memory is memory in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]


def main(name: str, lora: bool, prompt_tokens: int, dead_shares: list[float]) -> None:
    contender = Contender(name, lora, prompt_tokens)
    model_alone = in_use()
    contender.dead_share = max(dead_shares)
    contender.step()
    for contender.dead_share in dead_shares:
        kept = in_use() - model_alone  # AdamW's state
        print("peak", kept + peak_beyond_now(contender.step))


if __name__ == "__main__":
    main(sys.argv[1], bool(int(sys.argv[2])), int(sys.argv[3]), [float(share) for share in sys.argv[4:]])
