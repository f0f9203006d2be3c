"""Rewards: is the answer right (by math-verify, or as text), and is it clearly marked as the answer.

math-verify limits each parse and comparison with a signal, which works in the main thread only; elsewhere it would
quietly return nothing, and every reward would be 0. So this module refuses to run in another thread.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from .questions import Question

_LATEX_COMMAND = re.compile(r"\\[a-zA-Z]+(\{[^{}]*\})?")
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_MARKED = re.compile(r"\\boxed\{[^{}]|####\s*\S|<answer>\s*[^\s<]")


def _require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "the correctness reward runs in the main thread only: math-verify limits its time with signals, "
            "and in a thread every answer would count as wrong"
        )


def _math_verify() -> Any:
    """Returns the module math_verify. Raises ``ImportError`` with the extra's name where it is missing."""
    try:
        import math_verify
    except ImportError:
        raise ImportError(
            'checking answers as mathematics needs math-verify: pip install "curvature-grpo[math-verify]"'
        ) from None
    return math_verify


def _parse(text: str) -> list[Any]:
    """Returns the text's formulas and numbers as math-verify's objects, ``\\boxed`` first."""
    library = _math_verify()
    formulas = library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()
    return library.parse(text, extraction_config=formulas)


def _after_hashes(text: str) -> str | None:
    """What follows the last ``####`` (GSM8K's mark) on its line, or None."""
    if "####" not in text:
        return None
    return text.rsplit("####", 1)[1].strip().split("\n")[0]


@cache
def parse_gold(answer: str) -> tuple[Any, ...]:
    """The gold answer as math-verify's objects, parsed once; empty where nothing can be parsed.

    Understands GSM8K's ``... #### 42``, ``\\boxed{...}`` in a solution, plain numbers, bare LaTeX
    (``\\frac{3}{4}``) and text whose last number or formula is the answer.
    """
    _require_main_thread()
    text = _after_hashes(answer)
    if text is None:
        text = answer
    text = text.replace("\\$", "").replace("\\!", "")  # LaTeX's dollars, and its thin space in 32,\\!348
    if "\\boxed" in text or "$" in text:
        return tuple(_parse(text))
    words = re.findall(r"[A-Za-z]{2,}", _LATEX_COMMAND.sub(" ", text))
    if len(words) < 3 and not _NUMBER.fullmatch(text.strip()):  # bare LaTeX: say that it is
        parsed = _parse(f"${text}$")
        if parsed:
            return tuple(parsed)
    return tuple(_parse(text))


@lru_cache(maxsize=100_000)  # late in training a policy repeats itself
def is_correct(gold: str, answer: str) -> bool:
    """Whether the completion's final answer equals the gold one: after ``####``, else boxed, else the last one."""
    _require_main_thread()
    marked = _after_hashes(answer)
    parsed = _parse(marked) if marked else []
    if not parsed:
        parsed = _parse(answer)
    return bool(_math_verify().verify(list(parse_gold(gold)), parsed))


def drop_bad_gold(questions: Sequence[Question], source: str, warn: Callable[[str], None]) -> list[Question]:
    """The questions whose gold answer can be parsed; the others are reported with their row numbers.

    Raises ``ValueError`` when none can.
    """
    good = [question for question in questions if parse_gold(question.answer)]
    bad = [question for question in questions if not parse_gold(question.answer)]
    if not good:
        raise ValueError(
            f"{source}: none of the {len(bad)} gold answers can be parsed as mathematics; "
            f"the first, row {bad[0].row}, is {bad[0].answer[-80:]!r}. Is it the right --answer_column?"
        )
    if bad:
        rows = ", ".join(str(question.row) for question in bad[:20]) + (", ..." if len(bad) > 20 else "")
        warn(f"{source}: {len(bad)} of {len(questions)} gold answers can't be parsed and are left out (rows {rows})")
    return good


def completion_text(completion: str | list[dict[str, str]], stop: str | None = None) -> str:
    """The text of a completion, plain or conversational, up to ``stop``."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return text.split(stop, 1)[0] if stop else text


def final_answer(text: str) -> str:
    """Between the last ``<answer>`` and ``</answer>``, else in the last ``\\boxed{}``, else all of it."""
    for pattern in (_ANSWER, _BOXED):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    return text.strip()


class Correctness:
    """Reward 1.0 for a right final answer, else 0.0; logs their share as ``accuracy`` (``eval_accuracy``).

    ``stop``: where a few-shot completion goes on to a question of its own, and is not read any further.
    """

    __name__ = "correctness"

    def __init__(self, stop: str | None = None) -> None:
        self.stop = stop

    def __call__(
        self,
        completions: list,
        gold: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        answers = map(self.answer_of, completions)
        rewards = [float(self.is_right(right, answer)) for right, answer in zip(gold, answers, strict=True)]
        if log_metric is not None:
            log_metric("accuracy", sum(rewards) / len(rewards))
        return rewards

    def answer_of(self, completion: str | list[dict[str, str]]) -> str:
        return completion_text(completion, self.stop)

    def is_right(self, gold: str, text: str) -> bool:
        return is_correct(gold, text)


class SameText(Correctness):
    """The same of text: right is a final answer (after ``####``, else marked, else all of it) that is the gold one word
    by word, but for case, line breaks and a full stop."""

    __name__ = "same_text"

    def is_right(self, gold: str, text: str) -> bool:
        return _plain(_after_hashes(text) or final_answer(text)) == _plain(gold)


def _plain(text: str) -> str:
    return " ".join(_TEXT.sub(r"\1", text).lower().strip().removesuffix(".").split())


class MarkedAnswer:
    """Format reward: 1.0 where a completion marks its answer (``\\boxed{}``, ``####``, ``<answer>``), else 0.0."""

    __name__ = "marked_answer"

    def __init__(self, stop: str | None = None) -> None:
        self.stop = stop

    def __call__(self, completions: list, **kwargs: Any) -> list[float]:
        return [float(bool(_MARKED.search(completion_text(item, self.stop)))) for item in completions]
