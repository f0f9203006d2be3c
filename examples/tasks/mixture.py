"""The built-in mixture: four unlike tasks made on the spot, sums, reversed letters, sorted letters and a puzzle.

Train and held-out exercises never share their content: two numbers, four letters (to reverse or to sort), three players
are on one side of the split, in whatever order they come.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPLITS = ("train", "held_out")
HELD_OUT_SHARE = 5  # one content in five is held out
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Exercise:
    """A question with its answer, and the ``slip`` that somebody careless answers; ``task`` is a key of ``TASKS``."""

    question: str
    answer: str
    slip: str
    task: str


Drawn = tuple[str, str, str, Sequence[int] | Sequence[str]]  # question, answer, slip, content


def _sum(rng: random.Random) -> Drawn:
    a, b = rng.randint(1, 99), rng.randint(1, 9)
    return f"What is {a} + {b}?", str(a + b), str(a), (a, b)


def _reversal(rng: random.Random) -> Drawn:
    letters = rng.sample(LETTERS, 4)
    return f"Reverse {' '.join(letters)}.", " ".join(letters[::-1]), letters[0], letters


def _sorting(rng: random.Random) -> Drawn:
    letters = rng.sample(LETTERS, 4)
    while letters == sorted(letters):
        letters = rng.sample(LETTERS, 4)
    return f"Sort {' '.join(letters)}.", " ".join(sorted(letters)), letters[-1], letters


def _puzzle(rng: random.Random) -> Drawn:
    best, middle, worst = rng.sample(LETTERS, 3)
    facts = [f"{best} beats {middle}", f"{middle} beats {worst}"]
    rng.shuffle(facts)
    asked = rng.choice(("best", "worst"))
    answer = best if asked == "best" else worst
    return f"Say {' and '.join(facts)}. Who is {asked}?", answer, middle, (best, middle, worst)


TASKS: dict[str, Callable[[random.Random], Drawn]] = {
    "sums": _sum,
    "reversals": _reversal,
    "sorting": _sorting,
    "puzzles": _puzzle,
}


def content_split(content: Sequence[int] | Sequence[str]) -> str:
    """``"train"`` or ``"held_out"``, the same for every order and every question."""
    digest = zlib.crc32(f"{sorted(content)}".encode())  # type: ignore[type-var]
    return "held_out" if digest % HELD_OUT_SHARE == 0 else "train"


def generate_exercises(
    count: int, *, split: str = "train", tasks: Sequence[str] = tuple(TASKS), seed: int = 0
) -> list[Exercise]:
    """``count`` different exercises, the tasks taking turns; the same arguments always give the same list.

    Raises ``ValueError`` for an unknown split or task, or when a task has fewer than the wanted number of exercises.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    if not tasks or any(task not in TASKS for task in tasks):
        raise ValueError(f"tasks={tuple(tasks)!r}: choose from {tuple(TASKS)}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")

    rng = random.Random(f"{seed}-{split}")  # a string seeds the same in every process, unlike hash()
    seen: set[str] = set()
    exercises: list[Exercise] = []
    tries_left = 200 * count + 2000
    while len(exercises) < count:
        task = tasks[len(exercises) % len(tasks)]
        question, answer, slip, content = TASKS[task](rng)
        if content_split(content) == split and question not in seen:
            seen.add(question)
            exercises.append(Exercise(question, answer, slip, task))
        tries_left -= 1
        if tries_left == 0:
            raise ValueError(
                f"count={count} is more than the {split} exercises that {', '.join(tasks)} have "
                f"({len(exercises)} found): ask for fewer"
            )
    return exercises
