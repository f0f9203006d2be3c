"""Tasks of the package reasoning-gym (logic, games, algebra, code, ...): questions by name, options and weights, and
its own scores as a reward.

``--dataset reasoning_gym:chain_sum,spell_backward --task_options chain_sum.max_terms=3 --task_weights 2 1``
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from .command_line import did_you_mean
from .correctness import completion_text, final_answer
from .questions import Question

Options = dict[str, object]  # of one task
PREFIX = "reasoning_gym:"
INSTALL = "pip install reasoning-gym"
INSTRUCTION = "Think step by step, and give the final answer between <answer> and </answer>."
MISSES = 500  # draws in a row without a new question, after which a task has no more
RIGHT = 0.999  # a score from which an answer counts as right; below it part of it is, or its form
HELD_OUT_SEED = 7919  # added to the seed, for questions that are held out


def task_names(dataset: str) -> list[str]:
    """Of ``reasoning_gym:NAME[,NAME...]``. Raises ``ValueError`` for an unknown one, with the nearest, for none, for
    one given twice, and where the package isn't installed."""
    if find_spec("reasoning_gym") is None:
        raise ValueError(f"--dataset {dataset} needs the package reasoning-gym: {INSTALL}")
    from reasoning_gym.factory import DATASETS

    names = [name.strip() for name in dataset.removeprefix(PREFIX).split(",") if name.strip()]
    if not names:
        raise ValueError(f"--dataset {dataset}: which tasks? {', '.join(sorted(DATASETS))}")
    for name in names:
        if name not in DATASETS:
            near = did_you_mean(name, DATASETS) or f"; it has {len(DATASETS)}"
            raise ValueError(f"--dataset {dataset}: reasoning-gym has no task {name!r}{near}")
        if names.count(name) > 1:
            raise ValueError(f"--dataset {dataset}: {name} is given twice; --task_weights says how much of each")
    return names


def task_options(names: Sequence[str], given: Sequence[str]) -> dict[str, Options]:
    """By task, from ``task.option=value`` (values as JSON, else as text). ``ValueError`` names what a task doesn't
    know, or doesn't take."""
    from reasoning_gym.factory import DATASETS

    found: dict[str, Options] = {name: {} for name in names}
    for item in given:
        place, equals, value = item.partition("=")
        name, dot, option = place.partition(".")
        if not equals or not dot:
            raise ValueError(f"--task_options {item!r} must be TASK.OPTION=VALUE")
        if name not in found:
            raise ValueError(f"--task_options {item}: {name!r} isn't a task of this run{did_you_mean(name, names)}")
        known = [one.name for one in fields(DATASETS[name][1]) if one.name not in ("seed", "size")]
        if option not in known:
            near = did_you_mean(option, known) or f"; it has {', '.join(known) or 'none'}"
            raise ValueError(f"--task_options {item}: {name} has no option {option!r}{near}")
        try:
            found[name][option] = json.loads(value)
        except ValueError:
            found[name][option] = value
    return found


def task_weights(names: Sequence[str], given: Sequence[float] | None) -> list[float]:
    """One for each task, 1 where none are given. ``ValueError`` for another number of them, for one that is negative or
    isn't finite, and for a mixture that sums to 0."""
    if not given:
        return [1.0] * len(names)
    wrong = {
        f": {len(given)} for {len(names)} tasks": len(given) != len(names),
        ": each must be a finite number": not all(map(math.isfinite, given)),
        f": {min(given)} is negative": min(given) < 0,
        " sum to 0: a mixture of nothing": sum(given) == 0,
    }
    for reason, broken in wrong.items():
        if broken:
            raise ValueError(f"--task_weights {' '.join(map(str, given))}{reason}")
    return [float(weight) for weight in given]


def counts(weights: Sequence[float], total: int) -> list[int]:
    """How many questions of each task, at least one of each whose weight isn't 0; they sum to ``total``."""
    some = [weight > 0 for weight in weights]
    if total < sum(some):
        raise ValueError(f"{total} questions are fewer than the {sum(some)} tasks")
    made = [max(int(one), int(total * weight / sum(weights))) for one, weight in zip(some, weights, strict=True)]
    while sum(made) != total:  # by the largest remainder, or from the largest
        if sum(made) > total:
            made[made.index(max(made))] -= 1
        else:
            short = [total * w / sum(weights) - n if w > 0 else -1.0 for w, n in zip(weights, made, strict=True)]
            made[short.index(max(short))] += 1
    return made


class Tasks:
    """The questions of a mixture, training and held-out ones different, and what scores their answers.

    The same arguments give the same questions in every process. ``ValueError`` for options whose values a task refuses.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[float], options: Mapping[str, Options], seed: int
    ) -> None:
        self.names, self.weights, self.options, self.seed = list(names), list(weights), options, seed
        self.entries: dict[tuple[str, str], dict] = {}  # by task and question
        self.scorers = {name: self._made(name, seed, 1) for name in self.names}

    def _made(self, name: str, seed: int, size: int) -> Any:
        from reasoning_gym import create_dataset

        try:
            return create_dataset(name, seed=seed, size=size, **self.options.get(name, {}))
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"--task_options: {name} refuses {dict(self.options[name])}: {error}") from None

    def questions(self, count: int, *, held_out: bool) -> list[Question]:
        """``count`` of all tasks by their weights, shuffled; ask for the training ones first. ``ValueError`` where a
        task has no more different ones."""
        found: list[Question] = []
        for name, wanted in zip(self.names, counts(self.weights, count), strict=True):
            found += self._of_task(name, wanted, held_out) if wanted else []
        random.Random(f"{self.seed}-{held_out}").shuffle(found)
        return found

    def _of_task(self, name: str, wanted: int, held_out: bool) -> list[Question]:
        seed = self.seed + HELD_OUT_SEED * held_out
        source = self._made(name, seed, 10 * wanted + MISSES)  # some tasks refuse to be asked for a million
        made: list[Question] = []
        row = latest = 0
        while len(made) < wanted and row - latest < MISSES and row < len(source):
            entry = source[row]
            row += 1
            key = (name, str(entry["question"]).strip())
            if key not in self.entries:
                latest = row
                self.entries[key] = entry
                answer = "" if entry["answer"] is None else str(entry["answer"])  # any right one will do
                made.append(Question(key[1], answer, row, name))
        if len(made) < wanted:
            kind = "held-out questions beside the training ones" if held_out else "training questions"
            raise ValueError(
                f"{name} has only {len(made)} different {kind}, not {wanted} (in {row} draws): harder ones "
                "(--task_options), or fewer (--train_size, --eval_size)"
            )
        return made


class GymScore:
    """The task's own score of the final answer, 0 to 1; logs the share that is right as ``accuracy``.

    An answer on which a scorer fails is wrong; the first one's error is said. ``stop``: as ``Correctness`` has it.
    """

    __name__ = "score"

    def __init__(self, tasks: Tasks, say: Callable[[str], None], stop: str | None = None) -> None:
        self.tasks, self.say, self.stop = tasks, say, stop
        self._failed: set[str] = set()

    def __call__(
        self,
        completions: list,
        question: list[str],
        task: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        rows = zip(completions, question, task, strict=True)
        scores = [self._score(completion_text(item, self.stop), asked, name) for item, asked, name in rows]
        if log_metric is not None:
            log_metric("accuracy", sum(score >= RIGHT for score in scores) / len(scores))
        return scores

    def _score(self, text: str, question: str, name: str) -> float:
        entry = self.tasks.entries.get((name, question))
        if entry is None:
            raise ValueError(f"{name} has made no question {question[:80]!r}: the mixture's own questions are scored")
        try:
            return float(self.tasks.scorers[name].score_answer(final_answer(text), entry))
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                told = f"{type(error).__name__}: {error}"
                self.say(f"{name}: its scorer fails on an answer, which counts as wrong ({told})")
            return 0.0
