"""Keeps a few hundred of a run's answers for the report, in ``<run folder>/sampled_completions.json``.

At steps that log interference (without it at every ``EVERY``-th) it keeps two prompts of the batch, one whose answers
differ in reward and one whose don't, with at most ``ANSWERS`` answers each, from the lowest reward to the highest.
Beyond ``MOST`` rows it drops every other step, and keeps half as many from then on. Only the main process does this; a
failure is logged once, and training goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_ext.advantages.prompt_keys import prompt_text

from .run_files import replace_text

logger = get_logger(__name__)
FILE = "sampled_completions.json"
EVERY, ANSWERS, MOST, TEXT = 10, 4, 240, 1500  # steps, answers of a prompt, rows, characters of a text


@dataclass(frozen=True)
class SampledAnswer:
    """A row of the file. ``rewards``: reward function -> value, None where it gave none."""

    step: int
    prompt: str
    answer: str
    rewards: dict[str, float | None]
    advantage: float | None


def answer_text(completion: Any) -> str:
    """The text of a completion as TRL logs it: a string, or messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list):
        return "\n".join(str(message.get("content")) for message in completion if isinstance(message, dict))
    return str(completion)


def rows_of(logs: Mapping[str, Any], step: int, num_generations: int) -> list[SampledAnswer]:
    """The rows that are kept of TRL's table of the latest batch, whose groups stand one after another."""
    prompts, answers, advantages, rewards = (logs[key] for key in ("prompt", "completion", "advantages", "rewards"))
    count = min(len(prompts), len(answers), len(advantages), *(len(values) for values in rewards.values()))
    starts = range(0, count - num_generations + 1, num_generations)
    alive = {start: any(advantages[start : start + num_generations]) for start in starts}
    chosen = [next((start for start in starts if alive[start] is kind), None) for kind in (True, False)]
    rows = []
    for start in (one for one in chosen if one is not None):
        for i in spread_by_reward(range(start, start + num_generations), rewards):
            given = {name: values[i] for name, values in rewards.items()}
            prompt, answer = prompt_text(prompts[i])[:TEXT], answer_text(answers[i])[:TEXT]
            rows.append(SampledAnswer(step, prompt, answer, given, advantages[i]))
    return rows


def spread_by_reward(rows: Sequence[int], rewards: Mapping[str, Sequence[float | None]]) -> list[int]:
    """At most ``ANSWERS`` of these rows, in order: of the lowest reward, of the highest, and evenly between them.

    By the sum over functions, where one that is missing counts 0."""

    def total(row: int) -> float:
        given = (values[row] for values in rewards.values())
        return sum(value for value in given if value is not None and value == value)

    ordered = sorted(rows, key=total)
    count = min(ANSWERS, len(ordered))
    places = {round(i * (len(ordered) - 1) / max(count - 1, 1)) for i in range(count)}
    return sorted(ordered[place] for place in places)


def read_completions(folder: Path) -> list[SampledAnswer]:
    """The rows of a run's folder; none where there is no file, or one that can't be read."""
    try:
        return [SampledAnswer(**row) for row in json.loads((folder / FILE).read_text())]
    except (OSError, ValueError, TypeError):
        return []


class KeptCompletions(TrainerCallback):
    """Keeps answers of every ``every``-th step; 0: of every ``EVERY``-th."""

    def __init__(self, every: int, num_generations: int) -> None:
        self.every, self.num_generations = every or EVERY, num_generations
        self._logs: Mapping[str, Any] | None = None  # of the latest training batch: evaluation fills the same table
        self.rows: list[SampledAnswer] = []
        self._on = True

    def see(self, logs: Mapping[str, Any]) -> None:
        """Copies TRL's table when it holds a training batch with its rewards."""
        if not self._on:
            return
        try:
            self._logs = {name: list(logs[name]) for name in ("prompt", "completion", "advantages")}
            self._logs["rewards"] = {name: list(values) for name, values in logs["rewards"].items()}
        except Exception as error:
            self._fail(error)

    def on_train_begin(self, args, state, control, **kwargs):
        kept = read_completions(Path(args.output_dir)) if state.global_step else []
        self.rows = [row for row in kept if row.step <= state.global_step]

    def on_step_end(self, args, state, control, **kwargs):
        due = (state.global_step - 1) % self.every == 0
        if not self._on or not state.is_world_process_zero or not due or self._logs is None:
            return
        try:
            self.rows += rows_of(self._logs, state.global_step, self.num_generations)
            while len(self.rows) > MOST:
                steps = sorted({row.step for row in self.rows})
                self.every *= 2
                self.rows = [row for row in self.rows if row.step in steps[::2]]
            text = json.dumps([asdict(row) for row in self.rows], ensure_ascii=False)
            replace_text(Path(args.output_dir) / FILE, text)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._on = False
        logger.warning(f"Answers aren't kept for the report: {type(error).__name__}: {error}. Training goes on.")
