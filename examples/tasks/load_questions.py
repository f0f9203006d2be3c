"""Loads training and held-out questions, and makes them prompts, as the command line of ``math.py`` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ext.run_checks import rows_within
from trl_ext.tasks.arithmetic import DEFAULT_LEVELS

from . import reasoning
from .command_line import say
from .correctness import drop_bad_gold
from .questions import (
    BUILT_IN_DATASETS,
    Question,
    build_dataset,
    built_in_questions,
    hold_out,
    hub_questions,
    read_questions,
)

if TYPE_CHECKING:
    from examples.math import MathArguments

TRAIN_SIZE = 700  # of tasks that make their questions on the spot
Split = tuple[list[Question], list[Question]]  # training, held-out


def is_mixture(script: MathArguments) -> bool:
    return script.dataset_path is None and script.dataset == "mixture"


def levels_of(script: MathArguments) -> tuple[int, ...]:
    return tuple(script.levels) or DEFAULT_LEVELS


def load_gym(script: MathArguments, seed: int) -> reasoning.Tasks | None:
    """The tasks of ``--dataset reasoning_gym:NAMES``; None for other datasets."""
    if script.dataset_path is not None or not script.dataset.startswith(reasoning.PREFIX):
        return None
    names = reasoning.task_names(script.dataset)
    weights = reasoning.task_weights(names, script.task_weights)
    return reasoning.Tasks(names, weights, reasoning.task_options(names, script.task_options), seed)


def load_questions(script: MathArguments, seed: int, gym: reasoning.Tasks | None) -> Split:
    """Returns training and held-out questions.

    Each has a gold answer that can be parsed, unless ``--reward`` or a task of ``gym`` scores it.
    """
    size = script.train_size or TRAIN_SIZE
    if gym is not None:
        return gym.questions(size, held_out=False), gym.questions(script.eval_size, held_out=True)
    if script.dataset_path is not None:
        return _read_files(script, script.dataset_path, seed)
    if script.dataset in BUILT_IN_DATASETS:
        train, held_out = (
            built_in_questions(script.dataset, count, held_out=held, levels=levels_of(script), seed=seed)
            for count, held in ((size, False), (script.eval_size, True))
        )
        return train, held_out
    columns = {"question_column": script.question_column, "answer_column": script.answer_column}
    train = drop_bad_gold(hub_questions(script.dataset, held_out=False, **columns), script.dataset, say)
    held_out = hub_questions(script.dataset, held_out=True, **columns)
    return train, drop_bad_gold(held_out, f"{script.dataset} (held out)", say)[: script.eval_size]


def _read_files(script: MathArguments, path: str, seed: int) -> Split:
    def read(file: str) -> list[Question]:
        own_reward = script.reward is not None
        found = read_questions(file, script.question_column, script.answer_column, own_reward=own_reward)
        return found if own_reward else drop_bad_gold(found, file, say)

    train = read(path)
    if script.eval_dataset_path is None:
        return hold_out(train, script.eval_size, seed)
    return train, read(script.eval_dataset_path)[: script.eval_size]


@dataclass(frozen=True)
class Prompts:
    """Datasets of prompts, their style, and the first training question, to print."""

    train: Dataset
    held_out: Dataset
    style: str
    first: Question


def choose_style(style: str, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Decides between ``chat`` and ``few_shot`` by the tokenizer's template. ``name``: of its model."""
    if style == "auto":
        return "chat" if tokenizer.chat_template else "few_shot"
    if style == "chat" and not tokenizer.chat_template:
        raise ValueError(f"--prompt_style chat: the tokenizer of {name} has no chat template")
    return style


def make_prompts(
    script: MathArguments,
    questions: Split,
    instruction: str,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    context: int | None,
) -> Prompts:
    """Turns questions into prompts, without those that leave no room for an answer.

    Args:
        instruction: the line below a chat question; the first training questions are the examples of a few-shot one.
        name: the model's.
        context: tokens that the model can read; None: not known.
    """
    style = choose_style(script.prompt_style, tokenizer, name)
    train, held_out = questions
    shots = script.num_shots if style == "few_shot" else 0
    if (there := min(len(train), script.train_size or len(train))) <= shots:
        raise ValueError(f"--num_shots {shots} needs more than the {there} training questions there are")
    examples, train = train[:shots], train[shots:]

    def prompts_of(part: Sequence[Question], whose: str) -> Dataset:
        dataset = build_dataset(part, style, instruction=instruction, examples=examples)
        rows = rows_within(dataset, tokenizer, context)
        if left_out := len(dataset) - len(rows):
            say(f"{left_out} {whose} questions are left out: longer than the model's context, {context}")
        return dataset.select(rows)

    train_dataset = prompts_of(train, "training")
    if script.train_size is not None:
        train_dataset = train_dataset.select(range(min(script.train_size - shots, len(train_dataset))))
    return Prompts(train_dataset, prompts_of(held_out, "held-out"), style, train[0])
