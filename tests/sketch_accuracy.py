"""Sketched against exact cosines, a real policy on real prompts: ``sketch_accuracy.py small|smollm2 full|lora P G T``.

P prompts, G sampled completions of at most T tokens each. Many draws of the sketch watch one and the same forward and
backward, a prompt at a time, so that 20 draws cost a few passes and not 20. Prints what it found.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for examples.tasks, where this is run as a script

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tasks.smollm2 import smollm2
from grpo_kernels import linear_grpo_loss, normalize_rewards
from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.sketch_error import predicted_rmse
from trl_ext.tasks.arithmetic import generate_problems
from trl_ext.tasks.small_policy import small_policy

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"
DRAWS, DIM = 20, 64


@dataclass
class Accuracy:
    """Over draws and pairs of live prompts; ``coverage`` and ``checks`` as the trainer logs them."""

    pairs: int
    rmse: float
    bias: float
    predicted: float
    coverage: float
    checks: list[float]


@dataclass
class Rollouts:
    """(B, T) ids and mask, the prompts' width, (B, C) the completions' live tokens, and advantages."""

    ids: torch.Tensor
    mask: torch.Tensor
    start: int
    live: torch.Tensor
    advantage_B: torch.Tensor


def load(policy: str, prompts: int, folder: Path | None):
    """Model, tokenizer and questions."""
    folder = folder or (small_policy(42) if policy != "smollm2" else smollm2())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if policy != "smollm2":
        return model, tokenizer, [problem.question for problem in generate_problems(prompts, seed=5)]
    lines = GSM8K.read_text().splitlines()[:prompts]
    return model, tokenizer, [json.loads(line)["question"] for line in lines]


def sample(model, tokenizer, questions: list[str], generations: int, max_tokens: int, modulo: int | None) -> Rollouts:
    """Rewards: the digits' sum modulo ``modulo``, or how many digits were written."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids, mask = (prompts[name].repeat_interleave(generations, 0) for name in ("input_ids", "attention_mask"))
    torch.manual_seed(0)
    options = {"max_new_tokens": max_tokens, "do_sample": True, "top_k": 0, "pad_token_id": tokenizer.pad_token_id}
    ids, start = model.generate(ids, attention_mask=mask, **options), mask.shape[1]
    ended = (ids[:, start:] == tokenizer.eos_token_id).long()
    live = ended.cumsum(1) - ended == 0
    texts = [tokenizer.decode(row[start:][alive]) for row, alive in zip(ids, live, strict=True)]
    found = [re.findall(r"\d+", text) for text in texts]
    rewards = [sum(map(int, f)) % modulo if modulo else sum(map(len, f)) for f in found]
    advantage_B = normalize_rewards(torch.tensor(rewards, dtype=torch.float32).view(-1, generations)).flatten()
    return Rollouts(ids, torch.cat([mask, live.long()], 1), start, live, advantage_B)


def add_lora(model):
    """Of rank 16 on every linear layer, in the middle of training: B isn't 0."""
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def combined(sketches: list[HeadSketch | None]) -> HeadSketch | None:
    """One for the fused head that serves all."""
    present = [sketch for sketch in sketches if sketch is not None]
    if not present:
        return None
    width = present[0].projection.shape[1]

    def add(projected_NK: torch.Tensor) -> None:
        for sketch, part in zip(present, projected_NK.split(width, dim=1), strict=True):
            sketch.add(part)

    return HeadSketch(torch.cat([sketch.projection for sketch in present], dim=1), add)


def record(model, backbone, rollouts: Rollouts, prompts: int, sketches: list[GradientSketch]):
    """The exact gradients of each prompt, from the backward passes that the sketches watch."""
    head, generations, tokens = model.get_output_embeddings(), len(rollouts.ids) // prompts, rollouts.live.numel()
    exact = []
    for prompt in range(prompts):
        rows = slice(prompt * generations, (prompt + 1) * generations)
        ids, live = rollouts.ids[rows], rollouts.live[rows]
        model.zero_grad(set_to_none=True)
        for sketch in sketches:
            sketch.set_rows(torch.full((generations,), prompt))
        hidden = backbone(input_ids=ids, attention_mask=rollouts.mask[rows]).last_hidden_state
        hidden_NH, sequence_N = hidden[:, rollouts.start - 1 : -1][live], live.nonzero()[:, 0]
        head_sketch = combined([sketch.head_sketch(head, hidden_NH, sequence_N) for sketch in sketches])
        targets_N, weights = ids[:, rollouts.start :][live], torch.full((generations,), 1 / tokens)
        arguments = (hidden_NH, head.weight, targets_N, sequence_N, rollouts.advantage_B[rows], weights)
        linear_grpo_loss(*arguments, head_sketch=head_sketch).loss.backward()
        exact.append([p.grad for p in sketches[0].trainable_parameters])
    return exact


def exact_products(sketch: GradientSketch, exact: list[list[torch.Tensor]]) -> tuple[torch.Tensor, float, float]:
    """(P, P) inner products, and the squares of the step's gradient: of what is tapped, and of all."""
    tapped = {id(parameter) for parameter in sketch.tapped_parameters}
    gram_PP, seen, total = torch.zeros(len(exact), len(exact), dtype=torch.float64), 0.0, 0.0
    for parameter, *gradients in zip(sketch.trainable_parameters, *exact, strict=True):
        for chunk in torch.stack([gradient.flatten() for gradient in gradients]).split(2**20, dim=1):
            gram_PP += chunk.double() @ chunk.double().T
        square = sum(gradients).square().sum().item()
        total += square
        seen += square if id(parameter) in tapped else 0.0
    return gram_PP, seen, total


def cosines(gram_PP: torch.Tensor, alive_P: torch.Tensor) -> torch.Tensor:
    gram_PP = gram_PP[alive_P][:, alive_P]
    norm_P = gram_PP.diagonal().sqrt()
    return (gram_PP / norm_P[:, None] / norm_P)[torch.triu_indices(len(norm_P), len(norm_P), 1).unbind()]


def sketch_accuracy(
    policy: str, lora: bool, prompts: int, generations: int, max_tokens: int, folder: Path | None = None
) -> Accuracy:
    """Rewards: digits written (GSM8K, where SmolLM2 is right in 3%), or the answer modulo 4 (arithmetic).

    ``folder``: another small policy.
    """
    model, tokenizer, questions = load(policy, prompts, folder)
    rollouts = sample(model, tokenizer, questions, generations, max_tokens, None if policy == "smollm2" else 4)
    backbone, model = model.model, add_lora(model) if lora else model
    sketches = [GradientSketch(model, DIM) for _ in range(DRAWS)]
    for seed, sketch in enumerate(sketches):
        sketch.open(1000 + seed)
    exact = record(model, backbone, rollouts, prompts, sketches)
    gram_PP, seen, total = exact_products(sketches[0], exact)
    alive_P = gram_PP.diagonal() > 0
    errors, predicted, checks = [], [], []
    for sketch in sketches:
        step = sketch.take()
        sum_P = torch.zeros(prompts, step.sketch[0].numel(), dtype=torch.float64)
        sum_P.index_add_(0, step.prompt_B, step.sketch.flatten(1).double())
        errors.append(cosines(sum_P @ sum_P.T, alive_P) - cosines(gram_PP, alive_P))
        predicted.append(predicted_rmse(step.sketch, step.prompt_B) ** 2)
        checks.append(sum_P.sum(0).norm().item() / seen**0.5)
        sketch.close()
    error = torch.stack(errors)
    return Accuracy(
        pairs=error.shape[1],
        rmse=error.square().mean().sqrt().item(),
        bias=error.mean().item(),
        predicted=(sum(predicted) / DRAWS) ** 0.5,
        coverage=seen / total,
        checks=checks,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", choices=("small", "smollm2"))
    parser.add_argument("trained", choices=("full", "lora"))
    for name in ("prompts", "generations", "max_tokens"):
        parser.add_argument(name, type=int)
    chosen = parser.parse_args()
    lora = chosen.trained == "lora"
    result = sketch_accuracy(chosen.policy, lora, chosen.prompts, chosen.generations, chosen.max_tokens)
    print(result, f"mean check {sum(result.checks) / DRAWS:.4f}")
