"""Sums of three numbers with a calculator that adds two: a tool for TRL's ``tools``, questions, and a policy.

The policy calls the tool, or answers without it, at random, and so is right when it happens to call it twice. That is
what GRPO brings out: to ask, to ask again with what came back, and to answer what came back last.
"""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ext.tasks import small_policy
from trl_ext.tasks.small_policy import ASSISTANT, EOS, USER, cached_policy, random_model

from . import mixture
from . import warm_up as shared
from .correctness import Correctness
from .mixture import content_split
from .warm_up import WarmUpOptimizer, digit_tokenizer

CALL, RESULT = "<call>", "<result>"
CALLING = f"{CALL}calculate expression"  # then the sum
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] + '<assistant>' }}"
    "{% elif message['role'] == 'tool' %}{{ '<result>' + message['content'] + '<assistant>' }}"
    "{% elif message.get('tool_calls') %}"
    "{% set called = message['tool_calls'][0]['function'] %}"
    "{{ '<call>' + called['name'] }}{% for name, value in called['arguments'].items() %}{{ ' ' + name + ' ' + value }}"
    "{% endfor %}{{ '<eos>' }}"
    "{% else %}{{ ' ' + message['content'] + '<eos>' }}{% endif %}"
    "{% endfor %}"
)
# how transformers reads a message from the text: <call>calculate expression 12 + 34<eos> is a call, others are answers
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ASSISTANT,
    "fields": {
        "tool_calls": {
            "open": CALLING,
            "close_pattern": EOS,
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "calculate", "arguments": {"expression": "{content}"}},
            },
        },
        "content": {"close_pattern": EOS, "content": "text"},
    },
}
BATCH = 64
LEARNING_STEPS = 150
MOST = 100_000  # questions; one in five of 729,000 is held out
CALLS = 0.5  # how often the teacher calls, each time it could

_SUM = re.compile(r"\s*(\d{1,6})\s*\+\s*(\d{1,6})\s*")


def calculate(expression: str) -> str:
    """
    Adds two whole numbers.

    Args:
        expression: The sum, such as 12 + 34.

    Returns:
        The result, such as 46.
    """
    found = _SUM.fullmatch(expression)
    if found is None:
        raise ValueError(f"{expression!r} isn't a sum of two whole numbers")
    return str(int(found[1]) + int(found[2]))


def questions(count: int, *, held_out: bool, seed: int) -> Dataset:
    """Columns ``prompt`` (a user's message) and ``gold``; training and held-out ones share no three numbers,
    in whatever order. ``ValueError`` for none, or for more than there surely are."""
    if not 1 <= count <= MOST:
        raise ValueError(f"count={count} must be from 1 to {MOST}")
    split = "held_out" if held_out else "train"
    rng = random.Random(f"{seed}-{split}")
    found: dict[tuple[int, ...], str] = {}
    while len(found) < count:
        numbers = _draw(rng, split)
        found[numbers] = str(sum(numbers))
    prompts = [[{"role": "user", "content": _question(numbers)}] for numbers in found]
    return Dataset.from_dict({"prompt": prompts, "gold": list(found.values())})


def _draw(rng: random.Random, split: str) -> tuple[int, ...]:
    """Draws three numbers of this side of the split."""
    while True:
        numbers = tuple(rng.randint(10, 99) for _ in range(3))
        if content_split(numbers) == split:
            return numbers


def _question(numbers: Sequence[int]) -> str:
    return f"What is {' + '.join(map(str, numbers))}?"


class SameNumber(Correctness):
    """Reward 1.0 where the policy's last message is the right number, else 0.0; logs their share as ``accuracy``."""

    __name__ = "same_number"

    def answer_of(self, completion) -> str:
        """A conversation that was cut ends with a call, or with the tool's result: no answer."""
        last = completion[-1]
        return "" if last["role"] != "assistant" or last.get("tool_calls") else (last.get("content") or "").strip()

    def is_right(self, gold: str, text: str) -> bool:
        return text == gold


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a tokenizer of digits, whose templates write and read the tool's calls and results."""
    texts = [_question((12, 34, 56)), CALLING.removeprefix(CALL)] * 10
    fast = digit_tokenizer(texts, 320, CHAT_TEMPLATE, (CALL, RESULT))
    fast.response_template = RESPONSE_TEMPLATE
    return fast


def _conversation(rng: random.Random) -> list[tuple[str, bool]]:
    """Draws a conversation of a teacher who calls the tool, or answers with the number he has. Each piece says who
    wrote it.
    """
    a, b, c = _draw(rng, "train")
    pieces = [(f"{USER}{_question((a, b, c))}{ASSISTANT}", False)]
    known = a
    for term in (b, c):
        if rng.random() >= CALLS:
            break
        pieces.append((f"{CALLING} {known} + {term}{EOS}", True))
        known += term
        pieces.append((f"{RESULT}{known}{ASSISTANT}", False))
    return [*pieces, (f" {known}{EOS}", True)]


def _batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids (B, T), right padded, and labels that are -100 on what the policy doesn't write."""
    conversations = [[(tokenizer.encode(t), own) for t, own in _conversation(rng)] for _ in range(BATCH)]
    rows = [[one for ids, _ in pieces for one in ids] for pieces in conversations]
    marks = [[one if own else -100 for ids, own in pieces for one in ids] for pieces in conversations]
    width = max(map(len, rows))
    ids, labels = (
        torch.tensor([row + [fill] * (width - len(row)) for row in matrix])
        for matrix, fill in ((rows, tokenizer.pad_token_id), (marks, -100))
    )
    return ids, labels


def warm_up(
    seed: int, report: Callable[[int, float], None] | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains the policy from scratch on the teacher's conversations; ``report(step, loss)`` every 50 steps."""
    tokenizer = build_tokenizer()
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = random_model(tokenizer)
        optimizer = WarmUpOptimizer(model, LEARNING_STEPS)
        for step in range(1, LEARNING_STEPS + 1):
            ids, labels = _batch(rng, tokenizer)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            if report is not None and step % 50 == 0:
                report(step, loss.item())
    return model, tokenizer


def calculator_policy(seed: int = 0, report: Callable[[int, float], None] | None = None) -> Path:
    """Folder of the warmed-up policy for this seed; trained on the first call, cached afterwards."""
    sources = [inspect.getsource(one) for one in (mixture, small_policy, shared, sys.modules[__name__])]
    return cached_policy("calculator-policy", [seed, *sources], lambda: warm_up(seed, report))
