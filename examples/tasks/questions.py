"""Questions with their gold answers, from a file, the hub or the built-in generator, and how they become prompts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from pyarrow import ArrowException, parquet

from trl_ext.tasks.arithmetic import generate_problems

from .mixture import generate_exercises

# hub id, configuration and split of the training and of the held-out questions
HUB_DATASETS = {
    "gsm8k": (("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
    "math": (("DigitalLearningGmbH/MATH-lighteval", "default", "train"), ("HuggingFaceH4/MATH-500", None, "test")),
}
BUILT_IN_DATASETS = ("mixture", "arithmetic")
DATASETS = (*BUILT_IN_DATASETS, *HUB_DATASETS)
FILE_TYPES = (".jsonl", ".json", ".parquet")
QUESTION_COLUMNS = ("question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
PROMPT_STYLES = ("auto", "chat", "few_shot")
# of the built-in problems, by level
TASKS = {1: "sums to 20", 2: "sums to 50", 3: "sums to 99", 4: "one-step stories", 5: "two-step stories"}
# columns that are TRL's, or ours already
NOT_PASSED_ON = (
    "prompt prompts completion completions completion_ids question gold task image images trainer_state log_extra "
    "log_metric tools environment_kwargs"
).split()
NEXT_QUESTION = "\nQuestion:"  # where a few-shot completion has gone on to a question of its own


@dataclass(frozen=True)
class Question:
    """A question and its gold answer as the source writes it; ``row`` counts the source's rows (or lines) from 1.
    ``task``: what it is one of, empty where nothing is said. ``more``: other columns of the source, for a reward."""

    question: str
    answer: str
    row: int
    task: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text: {error}") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} isn't JSON: {error}") from None


def _read_rows(path: Path) -> list[tuple[int, dict]]:
    """(row or line number, row) pairs of a jsonl, json or parquet file."""
    if path.suffix == ".parquet":
        try:
            return list(enumerate(parquet.read_table(path).to_pylist(), start=1))
        except (OSError, ArrowException) as error:
            raise ValueError(f"{path} isn't a parquet file: {error}") from None
    if path.suffix == ".json":
        rows = _parse_json(_read_text(path), str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a JSON {type(rows).__name__}: expected a list of objects")
        numbered = list(enumerate(rows, start=1))
    else:
        lines = enumerate(_read_text(path).split("\n"), start=1)
        numbered = [(n, _parse_json(line, f"{path}, line {n}")) for n, line in lines if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is a {type(row).__name__}: expected an object with named columns")
    return numbered


def _pick_column(columns: Sequence[str], wanted: str | None, known: Sequence[str], flag: str, source: str) -> str:
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{flag}={wanted!r} is not a column of {source}, which has: {', '.join(columns)}")
    found = wanted or next((name for name in known if name in columns), None)
    if found is None:
        has = f"{source} has no column {' or '.join(known)}; it has: {', '.join(columns)}"
        raise ValueError(f"{has}. Say which one with {flag}")
    return found


def _to_questions(
    numbered: list[tuple[int, dict]],
    question_column: str | None,
    answer_column: str | None,
    source: str,
    *,
    own_reward: bool = False,
) -> list[Question]:
    if not numbered:
        raise ValueError(f"{source} is empty")
    columns = list(numbered[0][1])
    names = [_pick_column(columns, question_column, QUESTION_COLUMNS, "--question_column", source)]
    if not own_reward or answer_column is not None or any(name in columns for name in ANSWER_COLUMNS):
        names.append(_pick_column(columns, answer_column, ANSWER_COLUMNS, "--answer_column", source))
    questions = []
    for number, row in numbered:
        texts = ["" if row.get(name) is None else str(row[name]).strip() for name in names]
        if "" in texts:
            raise ValueError(f"{source}, row {number} has nothing in column {names[texts.index('')]!r}")
        more = {name: value for name, value in row.items() if name not in NOT_PASSED_ON} if own_reward else {}
        task = "" if row.get("task") is None else str(row["task"])
        questions.append(Question(texts[0], texts[1] if texts[1:] else "", number, task, more))
    return questions


def read_questions(
    path: str | Path,
    question_column: str | None = None,
    answer_column: str | None = None,
    *,
    own_reward: bool = False,
) -> list[Question]:
    """Questions of a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file.

    Columns ``question`` or ``problem``, and ``answer`` or ``solution``, are recognised (GSM8K, MATH, MATH-500);
    others are named by the arguments. A column ``task`` travels with them. ``own_reward``: they needn't have an answer,
    and keep their other columns. Raises ``ValueError`` for a missing file, another type, a line that isn't JSON
    (with its number), a missing column, an empty value (with its row) or an empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if path.suffix not in FILE_TYPES:
        raise ValueError(f"{path} has type {path.suffix!r}: expected one of {', '.join(FILE_TYPES)}")
    return _to_questions(_read_rows(path), question_column, answer_column, str(path), own_reward=own_reward)


def hub_questions(
    dataset: str, *, held_out: bool, question_column: str | None = None, answer_column: str | None = None
) -> list[Question]:
    """Questions of ``gsm8k`` or ``math`` from the Hugging Face hub (or its local cache)."""
    if dataset not in HUB_DATASETS:
        raise ValueError(f"dataset={dataset!r}: choose from {', '.join(HUB_DATASETS)}")
    name, configuration, split = HUB_DATASETS[dataset][held_out]
    try:
        rows = load_dataset(name, configuration, split=split).to_list()
    except Exception as error:
        raise ValueError(
            f"dataset {dataset!r} could not be loaded from the hub ({name}): {error}. "
            "Without a network, give a local copy with --dataset_path FILE"
        ) from error
    return _to_questions(list(enumerate(rows, start=1)), question_column, answer_column, name)


def arithmetic_questions(count: int, *, held_out: bool, levels: tuple[int, ...], seed: int) -> list[Question]:
    """Questions of the built-in generator, see ``arithmetic.py``."""
    problems = generate_problems(count, split="held_out" if held_out else "train", levels=levels, seed=seed)
    return [
        Question(problem.question, str(problem.answer), row, TASKS[problem.level])
        for row, problem in enumerate(problems, start=1)
    ]


def built_in_questions(
    dataset: str, count: int, *, held_out: bool, levels: tuple[int, ...], seed: int
) -> list[Question]:
    """Questions of ``mixture`` or of ``arithmetic``, which alone has levels."""
    if dataset == "arithmetic":
        return arithmetic_questions(count, held_out=held_out, levels=levels, seed=seed)
    exercises = generate_exercises(count, split="held_out" if held_out else "train", seed=seed)
    return [Question(one.question, one.answer, row, one.task) for row, one in enumerate(exercises, start=1)]


def hold_out(questions: list[Question], count: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Splits off ``count`` random questions: (the rest, the held-out ones)."""
    if count >= len(questions):
        raise ValueError(f"eval_size={count} leaves nothing to train on: there are {len(questions)} questions")
    chosen = set(random.Random(seed).sample(range(len(questions)), count))
    rest = [question for index, question in enumerate(questions) if index not in chosen]
    return rest, [questions[index] for index in sorted(chosen)]


def few_shot_prompt(question: str, examples: Sequence[Question]) -> str:
    """Solved examples, then the question, ending where the model should answer.

    GSM8K's calculator annotations, ``<<3+4=7>>``, are left out of the examples.
    """
    solved = [f"Question: {shot.question}\nAnswer: {re.sub(r'<<.*?>>', '', shot.answer)}\n\n" for shot in examples]
    return "".join(solved) + f"Question: {question}\nAnswer:"


def build_dataset(
    questions: Sequence[Question], style: str, *, instruction: str = "", examples: Sequence[Question] = ()
) -> Dataset:
    """A dataset for the trainer, columns ``prompt``, ``question`` and ``gold`` (the answer as the source writes it);
    ``task`` where a question has one, and what else all of them have.

    ``style`` is ``"chat"`` (one user message, the instruction below the question) or ``"few_shot"`` (plain text).
    """
    if style == "chat":
        texts = [f"{item.question}\n{instruction}".rstrip() for item in questions]
        prompts: list = [[{"role": "user", "content": text}] for text in texts]
    else:
        prompts = [few_shot_prompt(item.question, examples) for item in questions]
    columns: dict[str, list[Any]] = {
        "prompt": prompts,
        "question": [item.question for item in questions],
        "gold": [item.answer for item in questions],
    }
    if any(item.task for item in questions):
        columns["task"] = [item.task or None for item in questions]
    for name in questions[0].more if questions else ():
        columns[name] = [item.more.get(name) for item in questions]
    return Dataset.from_dict(columns)
