"""The built-in policy of the mixture: the small Llama of ``small_policy``, warmed up to another pass rate in each task.

As there: first supervised learning on right answers, until it can do all four tasks; then a few steps on a careless
teacher's, who is right as often as ``TARGETS`` says and answers the slip otherwise. So there are prompts of mixed
difficulty, from about 0.1 to 0.65, and in each task an ability to bring out.

Digits are single tokens here, so that sums of numbers never seen together can be right (with whole numbers as tokens a
third of them were, however right those seen had become). Muon trains the matrices: AdamW alone had learned no reversal
after 900 steps.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ext.tasks import small_policy
from trl_ext.tasks.progress import Progress
from trl_ext.tasks.small_policy import (
    Encoded,
    cached_policy,
    draw_batch,
    encode,
    expected_accuracy,
    random_model,
)

from . import mixture
from . import warm_up as shared
from .mixture import LETTERS, TASKS, generate_exercises
from .warm_up import WarmUpOptimizer, digit_tokenizer

EXERCISES = {"sums": 680, "reversals": 2000, "sorting": 4000, "puzzles": 4000}  # to learn from; there are 711 sums
CHECKED = 70  # held-out exercises of each task
LEARNING_STEPS = 500
TURNS = ("sums", "puzzles", "sums", "reversals", "puzzles", "sorting")  # a task a step; two are slower to learn
LEARNED_ACCURACY = 0.8  # in each task; then the careless teacher takes over
CARELESS_LEARNING_RATE = 3e-4
CARELESS_STEPS = 60  # each with a batch and a check of every task: 4.3 times a step of the first part, measured
TARGETS = {"sums": 0.45, "reversals": 0.13, "sorting": 0.68, "puzzles": 0.22}
NEAR = 0.05  # of a target


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the mixture's own questions; digits are tokens, and letters that stand alone."""
    questions = [exercise.question for exercise in generate_exercises(1200, seed=0)]
    return digit_tokenizer(questions + [f" {letter}" for letter in LETTERS] * 100, 640)


def _data(task: str, seed: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Encoded, Encoded, Encoded]:
    """Encodes training exercises with answers, the same with slips, and held-out ones with answers."""
    train = generate_exercises(EXERCISES[task], tasks=(task,), seed=seed)
    held_out = generate_exercises(CHECKED, split="held_out", tasks=(task,), seed=seed)
    return (
        encode([one.question for one in train], [one.answer for one in train], tokenizer),
        encode([one.question for one in train], [one.slip for one in train], tokenizer),
        encode([one.question for one in held_out], [one.answer for one in held_out], tokenizer),
    )


def _slips(accuracy: float, target: float) -> float:
    """Returns the teacher's rate of slips: 1 - target at the target, more above it, less below."""

    def logit(probability: float) -> float:
        return math.log(max(probability, 1e-3) / max(1 - probability, 1e-3))

    return 1 / (1 + math.exp(logit(target) - 2 * (logit(accuracy) - logit(target))))


def warm_up(
    seed: int, report: Callable[[int, dict[str, float]], None] | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, float]]:
    """Trains the policy from scratch until its expected accuracy in held-out exercises is near ``TARGETS``.

    ``report(step, accuracies)`` is called as it goes. Returns model, tokenizer and those accuracies.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = random_model(tokenizer)
        data = {task: _data(task, seed, tokenizer) for task in TASKS}

        def accuracies() -> dict[str, float]:
            return {task: expected_accuracy(model, *check) for task, (_, _, check) in data.items()}

        def backward(task: str, careless: float) -> None:
            right, slips, _ = data[task]
            ids, labels = draw_batch(right, slips, careless, tokenizer.pad_token_id)
            model(input_ids=ids, labels=labels).loss.backward()

        optimizer = WarmUpOptimizer(model, LEARNING_STEPS)
        for step in range(1, LEARNING_STEPS + 1):
            backward(TURNS[step % len(TURNS)], careless=0.0)
            optimizer.step()
            if step % 25 == 0:
                reached = accuracies()
                if report is not None:
                    report(step, reached)
                if min(reached.values()) >= LEARNED_ACCURACY:
                    break

        step, reached = _follow_careless_teacher(model, step, accuracies, backward)
        if report is not None:
            report(step, reached)
    return model, tokenizer, reached


def _follow_careless_teacher(
    model: LlamaForCausalLM,
    step: int,
    accuracies: Callable[[], dict[str, float]],
    backward: Callable[[str, float], None],
) -> tuple[int, dict[str, float]]:
    """Trains until each task's accuracy is near its target, at most ``CARELESS_STEPS``; returns step and accuracies."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=CARELESS_LEARNING_RATE, betas=(0.5, 0.98))
    reached = accuracies()
    last = step + CARELESS_STEPS
    while step < last and any(abs(reached[task] - target) > NEAR for task, target in TARGETS.items()):
        for task, target in TARGETS.items():
            backward(task, _slips(reached[task], target))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reached, step = accuracies(), step + 1
    return step, reached


def mixed_policy(seed: int = 0, report: Callable[[int, dict[str, float]], None] | None = None) -> Path:
    """Folder of the warmed-up policy for this seed; trained on the first call, cached afterwards. ``report`` as in
    ``small_policy``."""
    sources = [inspect.getsource(one) for one in (mixture, small_policy, shared, sys.modules[__name__])]
    return cached_policy(
        "mixed-policy",
        [seed, *sources],
        lambda: warm_up(seed, report or Progress(LEARNING_STEPS, 5 * CARELESS_STEPS))[:2],
    )
