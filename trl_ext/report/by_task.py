"""Where a dataset has a column ``task``: how the tasks interfere, and which has the lowest reward."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from .evidence import interval
from .read_run import Run
from .sections import Curves
from .signatures.gradients import task_cosines

CHARTS = {
    "reward": ("Reward by task", "mean reward"),
    "live_share": ("Live prompts by task", "share of its prompts"),
    "heard": ("Who is heard", "share of the step's gradient"),
}
RECENT = 0.25  # share of the log that the weakest is judged by


def task_metric_names(run: Run) -> list[str]:
    """Of the log, those that have a chart."""
    pattern = re.compile(rf"tasks/.+/({'|'.join(CHARTS)})")
    return sorted({name for entry in run.logs for name in entry if pattern.fullmatch(name)})


def task_charts(names: list[str]) -> list[Curves]:
    """A line for each task in each of ``CHARTS``; ``names``: of metrics that were logged."""
    found = []
    for key, (title, axis) in CHARTS.items():
        metrics = {name: name[len("tasks/") : -len(key) - 1] for name in names if name.endswith(f"/{key}")}
        if len(metrics) > 1:
            found.append(Curves(title, axis, metrics))
    return found


def tasks(run: Run) -> dict[str, Any] | None:
    """Task against task: mean cosines over steps, and their intervals as text; sentences. None with fewer than two
    tasks."""
    pairs = task_cosines(run)
    names = sorted({name for pair in pairs for name in pair})
    if len(names) < 2:
        return None
    cosines: list[list[float | None]] = [[1.0 if a == b else None for b in names] for a in names]
    texts = [["" for _ in names] for _ in names]
    for (a, b), (_, values) in pairs.items():
        mean, low, high = interval(values)
        told = f"{mean:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")
        for i, j in ((names.index(a), names.index(b)), (names.index(b), names.index(a))):
            cosines[i][j], texts[i][j] = mean, told
    found = {"names": names, "cosines": cosines, "texts": texts}
    return {**found, "told": [_interfering(pairs), *_weakest(run, names)]}


def _interfering(pairs: dict[tuple[str, str], tuple[list[int], list[float]]]) -> str:
    """One sentence."""
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
    told = [f"against one another: {', '.join(against[:3])}"] if against else []
    told += [f"along with one another: {', '.join(along[:3])}"] if along else []
    return f"Gradients of tasks that go {'; '.join(told)}."


def _weakest(run: Run, names: list[str]) -> list[str]:
    """Names the task with the lowest reward in the last quarter of the log."""
    rewards = {}
    for name in names:
        _, values = run.curve(f"tasks/{name}/reward")
        known = [value for value in values if value is not None]
        if known:
            rewards[name] = float(np.mean(known[-max(1, round(RECENT * len(known))) :]))
    if len(rewards) < 2:
        return []
    weakest = min(rewards, key=lambda name: rewards[name])
    return [f"The weakest task is {weakest}: a mean reward of {rewards[weakest]:.2f} in the last quarter of the log."]
