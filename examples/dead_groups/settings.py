"""The four settings: policies, questions with their pass rates, and rewards."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tasks.correctness import SameText
from examples.tasks.mixed_policy import mixed_policy
from examples.tasks.questions import Question, arithmetic_questions, built_in_questions
from trl_ext.tasks import small_policy

CANDIDATES = {1: 350, 2: 500, 4: 700, 5: 500}  # questions of each level; there are no more of the first
NEVER = 0.003  # pass rate: one group in forty has a right answer
SOMETIMES = (0.02, 0.95)
HELD_OUT = 240


@dataclass(frozen=True)
class Setting:
    """``questions`` to train on; ``flips``: the share of rewards that are wrong."""

    task: str
    questions: int
    flips: float


SETTINGS = {
    "mixture": Setting("mixture", 720, 0.0),  # each question is seen once or twice
    "many_visits": Setting("mixture", 96, 0.0),  # about ten times
    "wide": Setting("wide", 480, 0.0),  # a third is never solved, a third nearly always; each is seen about twice
    "wide_flips": Setting("wide", 480, 0.1),
}


class Wide(small_policy.WarmUp):
    """Learns sums to 20 and one-step stories; is then careless in stories alone. It sees no other level."""

    learned, target, careless = 0.93, 0.35, 0.7
    learned_levels = (1, 4)

    def unlearn(self) -> float:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=small_policy.CARELESS_LEARNING_RATE)
        for number in range(small_policy.CARELESS_STEPS):
            reached = small_policy.expected_accuracy(self.model, *self.check[1])
            if reached <= self.target:
                break
            self.step(optimizer, number, self.careless if number % 2 else 0.0)  # levels take turns
        return self.accuracy()


def wide_policy(seed: int) -> Path:
    """Returns the folder of the policy; made on the first call, in a minute or two."""
    recipe = [seed, list(Wide.learned_levels), Wide.learned, Wide.target, Wide.careless]
    return small_policy.cached_policy(
        "wide-policy", recipe, lambda: small_policy.warm_up(seed, Wide.learned_levels, kind=Wide)[:2]
    )


@torch.no_grad()
def pass_rates(model: Any, tokenizer: Any, questions: Sequence[Question]) -> torch.Tensor:
    """Returns the probability (N,) of each right answer, sampled at temperature 1: exact, but for other spellings."""
    ids, labels = small_policy.encode([one.question for one in questions], [one.answer for one in questions], tokenizer)
    inputs, targets = ids[:, :-1], labels[:, 1:]
    hidden = model.model(input_ids=inputs, attention_mask=(inputs != tokenizer.pad_token_id).long()).last_hidden_state
    answered = targets >= 0
    chosen = torch.log_softmax(model.lm_head(hidden[answered]).float(), -1).gather(-1, targets[answered].unsqueeze(-1))
    sums = torch.zeros(len(questions)).index_add_(0, answered.nonzero()[:, 0], chosen.squeeze(-1))
    return sums.exp()


def thirds(model: Any, tokenizer: Any, questions: int, seed: int) -> list[Question]:
    """Returns questions: a third below the pass rate ``NEVER``, a third solved most often, a third in between."""
    found = [
        one
        for level, count in CANDIDATES.items()
        for one in arithmetic_questions(count, held_out=False, levels=(level,), seed=seed)
    ]
    rates = pass_rates(model, tokenizer, found).tolist()
    by_rate = sorted(zip(rates, range(len(found)), strict=True), reverse=True)
    third = questions // 3
    always = [found[place] for _, place in by_rate[:third]]
    never = [found[place] for rate, place in by_rate if rate < NEVER]
    sometimes = [found[place] for rate, place in by_rate[third:] if SOMETIMES[0] < rate < SOMETIMES[1]]
    if min(len(never), len(sometimes)) < third:
        raise ValueError(f"seed {seed}: {len(never)} questions are never solved, {len(sometimes)} sometimes")
    draw = random.Random(seed)
    chosen = [*always, *draw.sample(never, third), *draw.sample(sometimes, third)]
    draw.shuffle(chosen)
    return chosen


@dataclass(frozen=True)
class Prepared:
    """What a run starts from. ``held_out_rates``: (N,) the untrained policy's pass rates of held-out questions."""

    policy: Path
    train: list[Question]
    held_out: list[Question]
    held_out_rates: torch.Tensor


@functools.cache  # an arm's runs follow each other
def prepare(setting: Setting, seed: int) -> Prepared:
    """Makes the policy and the questions of a seed. All arms have the same.

    The mixture's policies take ten minutes of one core each: one for the tuning seeds, and one for the others.
    """
    policy = mixed_policy(min(seed // 100, 1) * 100) if setting.task == "mixture" else wide_policy(seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    if setting.task == "mixture":
        options: dict[str, Any] = {"levels": (), "seed": seed}
        train = built_in_questions("mixture", setting.questions, held_out=False, **options)
        held_out = built_in_questions("mixture", HELD_OUT, held_out=True, **options)
    else:
        train = thirds(model, tokenizer, setting.questions, seed)
        size = HELD_OUT // len(CANDIDATES)
        held_out = [
            one for level in CANDIDATES for one in arithmetic_questions(size, held_out=True, levels=(level,), seed=seed)
        ]
    return Prepared(policy, train, held_out, pass_rates(model, tokenizer, held_out))


class Rewards(SameText):
    """1 for the right text, else 0; ``flips`` of them the other way round. ``true`` has the latest right ones."""

    __name__ = "same_text"

    def __init__(self, flips: float, seed: int) -> None:
        super().__init__()
        self.flips, self.random, self.true = flips, random.Random(seed), [0.0]

    def __call__(self, completions: list, gold: list[str], log_metric: Any = None, **kwargs: Any) -> list[float]:
        self.true = super().__call__(completions, gold, log_metric)
        return [1 - one if self.random.random() < self.flips else one for one in self.true]
