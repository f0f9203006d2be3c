"""A few hundred of a run's answers, for the report: ``<run folder>/sampled_completions.json``.

At the steps that log interference (every ``EVERY``-th without) two prompts of the batch, one whose answers' rewards
differ and one whose don't, with at most ``ANSWERS`` answers each: that of the lowest and that of the highest reward,
and between them a spread. Beyond ``MOST`` rows every other step is dropped, and
from there on as rarely kept. On the main process; a failure is said once, and training goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_ext.advantages.prompt_keys import prompt_text

logger = get_logger(__name__)
FILE = "sampled_completions.json"
EVERY, ANSWERS, MOST, TEXT = 10, 4, 240, 1500  # steps, answers of a prompt, rows, characters of a text


def answer_text(completion: Any) -> str:
    """Of a completion as TRL logs it: a string, or messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list):
        return "\n".join(str(message.get("content")) for message in completion if isinstance(message, dict))
    return str(completion)


def rows_of(logs: Mapping[str, Any], step: int, num_generations: int) -> list[dict[str, Any]]:
    """Of TRL's table of the latest batch, whose groups stand one after another."""
    prompts, answers = list(logs["prompt"]), list(logs["completion"])
    advantages = list(logs["advantages"])
    rewards = {name: list(values) for name, values in logs["rewards"].items()}
    count = min(len(prompts), len(answers), len(advantages), *(len(values) for values in rewards.values()))
    starts = range(0, count - num_generations + 1, num_generations)
    alive = {start: any(advantages[start : start + num_generations]) for start in starts}
    chosen = [next((start for start in starts if alive[start] is kind), None) for kind in (True, False)]
    rows = []
    for start in chosen:
        if start is None:
            continue
        for i in spread_by_reward(range(start, start + num_generations), rewards):
            row = {"step": step, "prompt": prompt_text(prompts[i])[:TEXT], "answer": answer_text(answers[i])[:TEXT]}
            row["rewards"] = {name: values[i] for name, values in rewards.items()}
            rows.append({**row, "advantage": advantages[i]})
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


def read_completions(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's folder; none where there is no file, or none that can be read."""
    try:
        rows = json.loads((folder / FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in rows if _is_row(row)] if isinstance(rows, list) else []


def _is_row(row: Any) -> bool:
    """Whether it has what ``rows_of`` gives."""

    def number(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and all(isinstance(row.get(name), str) for name in ("prompt", "answer"))
        and isinstance(row.get("rewards"), dict)
        and all(map(number, [*row["rewards"].values(), row.get("advantage")]))
        and "advantage" in row
    )


class KeptCompletions(TrainerCallback):
    """``every``: steps, 0 for ``EVERY``."""

    def __init__(self, every: int, num_generations: int) -> None:
        self.every, self.num_generations = every or EVERY, num_generations
        self._logs: dict[str, Any] | None = None  # of the latest training batch: evaluation fills the same table
        self.rows: list[dict[str, Any]] = []
        self._on = True

    def see(self, logs: Mapping[str, Any]) -> None:
        """TRL's table, when it has the rewards of a training batch."""
        if not self._on:
            return
        try:
            self._logs = {name: list(logs[name]) for name in ("prompt", "completion", "advantages")}
            self._logs["rewards"] = {name: list(values) for name, values in logs["rewards"].items()}
        except Exception as error:
            self._fail(error)

    def on_train_begin(self, args, state, control, **kwargs):
        kept = read_completions(Path(args.output_dir)) if state.global_step else []
        self.rows = [row for row in kept if row["step"] <= state.global_step]

    def on_step_end(self, args, state, control, **kwargs):
        due = (state.global_step - 1) % self.every == 0
        if not self._on or not state.is_world_process_zero or not due or self._logs is None:
            return
        try:
            self.rows += rows_of(self._logs, state.global_step, self.num_generations)
            while len(self.rows) > MOST:
                steps = sorted({row["step"] for row in self.rows})
                self.every *= 2
                self.rows = [row for row in self.rows if row["step"] in steps[::2]]
            self._write(Path(args.output_dir))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._on = False
        logger.warning(f"Answers aren't kept for the report: {type(error).__name__}: {error}. Training goes on.")

    def _write(self, folder: Path) -> None:
        scratch = folder / f".{FILE}.{os.getpid()}"
        scratch.write_text(json.dumps(self.rows, ensure_ascii=False), errors="replace")
        scratch.replace(folder / FILE)
