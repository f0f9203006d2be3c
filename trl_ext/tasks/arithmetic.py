"""Generates the built-in data: sums and arithmetic word problems in five levels of difficulty.

Train and held-out problems never share operands: ``12 + 7``, ``7 + 12`` and every story about adding 12 and 7 belong to
the same split. So held-out accuracy measures arithmetic, not memory.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

LEVELS = {
    1: "sums of numbers up to 20",
    2: "sums of numbers up to 50",
    3: "sums of numbers up to 99",
    4: "one-step word problems, numbers up to 20",
    5: "two-step word problems, numbers up to 20",
}
LARGEST = {1: 20, 2: 50, 3: 99, 4: 20, 5: 20}
WORD_PROBLEMS = (4, 5)
DEFAULT_LEVELS = (1, 4)
SPLITS = ("train", "held_out")
HELD_OUT_SHARE = 5  # one operand tuple in five is held out

NAMES = ("Tom", "Ana", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe")
THINGS = ("apples", "books", "coins", "pens", "cards", "shells")
ADD_STORIES = (
    "{name} has {a} {things} and gets {b} more. How many now?",
    "{name} has {a} {things}. {other} has {b}. How many in all?",
)
SUBTRACT_STORIES = (
    "{name} has {a} {things} and loses {b}. How many are left?",
    "{name} has {a} {things} and gives {b} to {other}. How many now?",
)
TWO_STEP_STORIES = (
    "{name} has {a} {things}, gets {b} more and loses {c}. How many are left?",
    "{name} has {a} {things} and {other} has {b}. They give away {c}. How many now?",
)


@dataclass(frozen=True)
class Problem:
    """A question with its integer answer; ``level`` is a key of ``LEVELS``."""

    question: str
    answer: int
    level: int


def problem_split(operands: tuple[int, ...], operation: str) -> str:
    """Returns "train" or "held_out", the same for every wording of the same calculation."""
    canonical = sorted(operands) if operation == "+" else list(operands)
    digest = zlib.crc32(f"{operation}{canonical}".encode())
    return "held_out" if digest % HELD_OUT_SHARE == 0 else "train"


def _draw(level: int, rng: random.Random) -> tuple[Problem, str]:
    """Draws a problem of this level. Returns it and the split that its operands belong to."""
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    a, b = rng.randint(0, LARGEST[level]), rng.randint(0, LARGEST[level])
    if level == 5:
        c = rng.randint(0, a + b)
        question = rng.choice(TWO_STEP_STORIES).format(a=a, b=b, c=c, **words)
        return Problem(question, a + b - c, level), problem_split((a, b, c), "+-")
    operation = rng.choice("+-") if level in WORD_PROBLEMS else "+"
    if operation == "-":
        a, b = max(a, b), min(a, b)
    answer = a + b if operation == "+" else a - b
    if level in WORD_PROBLEMS:
        stories = ADD_STORIES if operation == "+" else SUBTRACT_STORIES
        question = rng.choice(stories).format(a=a, b=b, **words)
    else:
        question = f"What is {a} + {b}?"
    return Problem(question, answer, level), problem_split((a, b), operation)


def generate_problems(
    count: int, *, split: str = "train", levels: tuple[int, ...] = DEFAULT_LEVELS, seed: int = 0
) -> list[Problem]:
    """Returns ``count`` different problems, with the levels in turn; equal arguments give equal lists.

    Raises ``ValueError`` for an unknown split or level, or if the levels have fewer than ``count`` problems.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise ValueError(f"levels={tuple(levels)!r}: choose from {tuple(LEVELS)}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")

    rng = random.Random(f"{seed}-{split}")  # a string gives the same seed in every process, unlike hash()
    seen: set[str] = set()
    problems: list[Problem] = []
    tries_left = 200 * count + 2000
    while len(problems) < count:
        level = levels[len(problems) % len(levels)]
        problem, side = _draw(level, rng)
        if side == split and problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
        tries_left -= 1
        if tries_left == 0:
            raise ValueError(
                f"count={count} is more than the {split} problems that levels {tuple(levels)} have "
                f"({len(problems)} found): ask for fewer, or add a level"
            )
    return problems
