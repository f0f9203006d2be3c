"""How the tasks of a dataset with a column ``task`` interfere, and which has the lowest reward."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .evidence import ends, interval
from .read_run import Run
from .signatures.gradients import task_cosines


@dataclass(frozen=True)
class TaskTable:
    """Of each two tasks the mean cosine over the steps and its interval as text; ``told``: sentences."""

    names: list[str]
    cosines: list[list[float | None]]
    texts: list[list[str]]
    told: list[str]


def tasks(run: Run) -> TaskTable | None:
    """None with fewer than two tasks."""
    pairs = task_cosines(run)
    names = sorted({name for pair in pairs for name in pair})
    if len(names) < 2:
        return None
    cosines: list[list[float | None]] = [[1.0 if a == b else None for b in names] for a in names]
    texts = [["" for _ in names] for _ in names]
    for (a, b), (_, values) in pairs.items():
        mean, low, high = interval(values)
        text = f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")
        i, j = names.index(a), names.index(b)
        cosines[i][j] = cosines[j][i] = mean
        texts[i][j] = texts[j][i] = text
    return TaskTable(names, cosines, texts, [_interfering(pairs), *_weakest(run, names)])


def _interfering(pairs: dict[tuple[str, str], tuple[list[int], list[float]]]) -> str:
    """Which tasks' cosines have an interval that excludes 0."""
    apart: list[tuple[float, str]] = []
    widest = 0.0
    for (a, b), (_, values) in pairs.items():
        mean, low, high = interval(values, looks=len(pairs))
        if not math.isfinite(low):
            return "Too few logged steps to tell whether the tasks interfere."
        widest = max(widest, abs(low), abs(high))
        if high < 0 or low > 0:
            apart.append((mean, f"{a} and {b} ({mean:+.2f})"))
    if not apart:
        return (
            "No two tasks' gradients can be told from orthogonal ones here; nor from a cosine of up to "
            f"{widest:.2f} in size."
        )
    against = [text for mean, text in sorted(apart) if mean < 0]
    along = [text for mean, text in sorted(apart, reverse=True) if mean > 0]
    groups = [f"against one another: {', '.join(against[:3])}"] if against else []
    groups += [f"along with one another: {', '.join(along[:3])}"] if along else []
    return f"Gradients of tasks that go {'; '.join(groups)}."


def _weakest(run: Run, names: list[str]) -> list[str]:
    """Names the task with the lowest reward in the last quarter of the log."""
    logged = {name: run.series(f"tasks/{name}/reward")[1] for name in names}
    rewards = {name: ends(values, 0.25)[1] for name, values in logged.items() if values}
    if len(rewards) < 2:
        return []
    weakest = min(rewards, key=lambda name: rewards[name])
    return [f"The weakest task is {weakest}: a mean reward of {rewards[weakest]:.2f} in the last quarter of the log."]
