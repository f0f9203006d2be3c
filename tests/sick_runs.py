"""Runs made sick on purpose: one for each signature, with the other verdicts that it may raise."""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from harness import prompts, question, train, two_tasks
from transformers import TrainerCallback

WORDS = 4  # the first token id that is a word


class Answers:
    """Stored rollouts: drawn anew at each step, ended by the end token, of a length that may depend on the step."""

    def __init__(self, length=lambda step: 6, same=False, ends=True, words=None):
        self.length, self.same, self.ends, self.words = length, same, ends, words

    def __call__(self, texts, trainer):
        tokenizer, step = trainer.processing_class, trainer.state.global_step
        generator = torch.Generator().manual_seed(1000 * step + len(texts))
        prompt_ids, completion_ids = [], []
        last = len(tokenizer) if self.words is None else WORDS + self.words
        for prompt in texts:
            prompt_ids.append(tokenizer.encode(f"<user>{prompt[0]['content']}<assistant>"))
            count = self.length(step) - self.ends
            ids = torch.randint(WORDS, last, (count,), generator=generator).tolist()
            ids = [ids[0]] * count if self.same else ids
            completion_ids.append([*ids, tokenizer.eos_token_id] if self.ends else ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


class AtStep(TrainerCallback):
    """Does something to the model before a step, counted from 0; ``first``: and before the run."""

    def __init__(self, step, change, first=None):
        self.step, self.change, self.first = step, change, first

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.first is not None:
            with torch.no_grad():
                self.first(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(model)


def scaled_head(factor):
    return lambda model: model.model.norm.weight.mul_(factor)


def noise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def broken(model):
    model.model.norm.weight.fill_(math.nan)


def all_of(value):
    return lambda completion_ids, **kwargs: [value] * len(completion_ids)


def some(completion_ids, **kwargs):
    """About half are right, by what is in them: nothing to be learned of it in a few steps."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def mostly_alike(prompts, completion_ids, **kwargs):
    """97 of 100 prompts have answers of equal reward."""
    texts = [prompt[0]["content"].encode() for prompt in prompts]
    return [
        float(zlib.crc32(text) % 2) if zlib.crc32(text[::-1]) % 100 < 97 else value
        for text, value in zip(texts, some(completion_ids), strict=True)
    ]


class ByStep:
    """A reward that moves with the steps: ``level(call)`` of the answers are right, different in every group."""

    __name__ = "by_step"

    def __init__(self, level, held_out=None):
        self.level, self.held_out, self.calls = level, held_out, 0

    def __call__(self, prompts, completion_ids, **kwargs):
        evaluation = self.held_out is not None and "held" in str(prompts[0])
        level = self.held_out if evaluation else self.level(self.calls)
        self.calls += not evaluation
        right = round(level * len(completion_ids))
        order = np.random.default_rng(self.calls).permutation(len(completion_ids))
        return [float(place < right) for place in order]


def first_group_scaled(factor):
    """The rewards of a batch's first group are in another unit."""
    return lambda completion_ids, **kwargs: [
        value * (factor if place < 4 else 1.0) for place, value in enumerate(some(completion_ids))
    ]


def one_of_sixteen(completion_ids, **kwargs):
    """A single right answer, which ``max_rl`` weighs fifteen times."""
    return [float(place % 16 == 0) for place in range(len(completion_ids))]


def burst():
    """A reward that is a thousand times as large in its 14th call."""
    calls = itertools.count(1)

    def reward(completion_ids, **kwargs):
        size = 1000.0 if next(calls) == 14 else 1.0
        return [size * value for value in some(completion_ids)]

    return reward


def slow(completion_ids, **kwargs):
    time.sleep(0.4)
    return some(completion_ids)


def unscored(completion_ids, **kwargs):
    values = some(completion_ids)
    return [None if sum(ids) % 3 == 0 else value for ids, value in zip(completion_ids, values, strict=True)]


def opposed(task, completion_ids, **kwargs):
    """Two tasks want the opposite of the same answers."""
    wanted = [float(ids[0] == WORDS) for ids in completion_ids]
    return [value if one == "up" else 1 - value for one, value in zip(task, wanted, strict=True)]


WIDE = {"per_device_train_batch_size": 32}  # eight groups a step: four steps are enough of them
LOGGED = {"interference_every": 1, "interference_dim": 16}
MANY = {**WIDE, **LOGGED}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_generations_eval": 4}
STILL = {"learning_rate": 0.0}


@dataclass(frozen=True)
class Sick:
    """What makes a run sick: its reward, options, answers, a change of the model; and what is said of it."""

    reward: Callable[..., list] = some
    options: dict[str, Any] = field(default_factory=dict)
    answers: Answers = field(default_factory=Answers)
    change: AtStep | None = None
    level: str = "warning"
    also: tuple[str, ...] = ()  # other verdicts that it may raise


SICK = {
    "all_wrong": Sick(all_of(0.0), WIDE, level="critical"),
    "all_right": Sick(all_of(1.0), WIDE, level="critical"),
    "mostly_dead": Sick(mostly_alike, {**WIDE, "max_steps": 16}, level="critical", also=("no_progress",)),
    "few_live_prompts": Sick(options=LOGGED, level="advice", also=("unreliable",)),
    "unscored": Sick(unscored, also=("mostly_dead",)),
    "fell": Sick(ByStep(lambda call: 0.75 if call < 12 else 0.1), {"max_steps": 24}, also=("mostly_dead",)),
    "no_progress": Sick(ByStep(lambda call: 0.5), {"max_steps": 40}, level="advice"),
    "gap": Sick(ByStep(lambda call: min(0.3 + 0.1 * call, 0.8), 0.3), EVALUATED),
    "length_limit": Sick(options={"max_completion_length": 6}, answers=Answers(ends=False), level="critical"),
    "repetition": Sick(options={"max_completion_length": 16}, answers=Answers(length=lambda step: 16, same=True)),
    "entropy_collapse": Sick(
        options={**STILL, "skip_zero_advantage": False},
        change=AtStep(5, scaled_head(3000.0)),
        also=("gradient_spikes",),
    ),
    "entropy_rise": Sick(
        options={**STILL, "skip_zero_advantage": False},
        change=AtStep(5, scaled_head(1e-2), scaled_head(10.0)),
        also=("gradient_spikes",),
    ),
    "length_hacking": Sick(
        ByStep(lambda call: min(0.3 + 0.05 * call, 0.8), 0.3),
        {**EVALUATED, "max_completion_length": 64},
        Answers(length=lambda step: 4 + 3 * step),
        also=("gap",),
    ),
    "tiny_denominators": Sick(first_group_scaled(1e-3), {"learning_rate": 1e-4}),
    "coefficient_spikes": Sick(
        one_of_sixteen,
        {**WIDE, "normalization": "max_rl", "num_generations": 16},
        also=("tiny_denominators", "mostly_dead"),
    ),
    "gradient_spikes": Sick(
        burst(), {"normalization": "mean", "max_steps": 20, "learning_rate": 1e-6}, also=("coefficient_spikes",)
    ),
    "clip_share": Sick(
        options={"num_iterations": 8, "learning_rate": 0.3, "max_steps": 16, "max_grad_norm": 100.0},
        also=("gradient_spikes", "entropy_rise", "entropy_collapse"),
    ),
    "divergence": Sick(
        options={**STILL, "beta": 1e-4}, change=AtStep(2, noise), also=("entropy_collapse", "gradient_spikes")
    ),
    "slow_rewards": Sick(slow, level="advice"),
    "uncovered": Sick(
        options={**LOGGED, "interference_layers": ["*layers.0.self_attn*"]}, also=("few_live_prompts", "unreliable")
    ),
    "unreliable": Sick(options={**MANY, **STILL, "max_steps": 16}, level="advice"),
    "dominated": Sick(
        first_group_scaled(50.0),
        {**MANY, "normalization": "mean", "learning_rate": 1e-5},
        also=("tiny_denominators", "coefficient_spikes", "unreliable"),
    ),
    "task_conflict": Sick(
        opposed,
        {**MANY, **STILL},
        Answers(length=lambda step: 3, words=2),
        also=("contradicts_theory", "unreliable"),
    ),
    "not_finite": Sick(change=AtStep(5, broken), level="critical", also=("divergence",)),
}


def held_out(rows) -> Dataset:
    return Dataset.from_dict({"prompt": [question(f"held {row}") for row in rows]})


def sick_run(name: str, policy: Path, folder: Path):
    sick = SICK[name]
    options = {"max_steps": 10, "interference_every": 0, "rollout_func": sick.answers, **sick.options}
    if "eval_strategy" in options:
        options["eval_dataset"] = held_out(range(8))
    dataset = two_tasks() if name == "task_conflict" else prompts(256)
    callbacks = [] if sick.change is None else [sick.change]
    return train(policy, folder, sick.reward, dataset, callbacks=callbacks, **options)
