"""Where a dataset has a column ``task``: do the tasks interfere, who is heard, and what would let the weakest learn?"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from .evidence import interval, student
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


def tasks(run: Run, table: dict[str, Any] | None) -> dict[str, Any] | None:
    """Task against task: mean cosines over steps, and their intervals as text; gains by normalisation and task, from
    the what-if ``table``; sentences. None with fewer than two tasks."""
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
    found = {"names": names, "cosines": cosines, "texts": texts, "gains": _gains(table, names)}
    return {**found, "told": [_interfering(pairs), *_weakest(run, table, names)]}


def _gains(table: dict[str, Any] | None, names: list[str]) -> list[dict[str, Any]]:
    """A row for each normalisation that has a gain of some task, by its cosine."""
    rows = []
    for method, one in sorted((table or {"methods": {}})["methods"].items(), key=lambda item: -item[1]["cos"]):
        cells = [one.get("tasks", {}).get(name, {}) for name in names]
        if any("gain" in cell for cell in cells):
            rows.append({"method": method, "cells": cells})
    return rows


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


def _weakest(run: Run, table: dict[str, Any] | None, names: list[str]) -> list[str]:
    """Which task has the lowest reward lately, and by which normalisation it would gain more."""
    rewards = {}
    for name in names:
        _, values = run.curve(f"tasks/{name}/reward")
        known = [value for value in values if value is not None]
        if known:
            rewards[name] = float(np.mean(known[-max(1, round(RECENT * len(known))) :]))
    if len(rewards) < 2:
        return []
    weakest = min(rewards, key=lambda name: rewards[name])
    told = f"The weakest task is {weakest}: a mean reward of {rewards[weakest]:.2f} in the last quarter of the log. "
    ahead = {
        method: {**one["tasks"][weakest], "steps": one["steps"]}
        for method, one in (table or {"methods": {}})["methods"].items()
        if one.get("tasks", {}).get(weakest, {}).get("ahead_error")
    }
    used = (table or {}).get("used") or "the step taken"
    sure = {  # at 95 % for all of them together
        method: one
        for method, one in ahead.items()
        if one["steps"] > 2 and one["ahead"] > student(one["steps"] - 1, 0.025 / len(ahead)) * one["ahead_error"]
    }
    if not ahead:
        return [told + "What it would gain by other normalisations can't be told."]
    if not sure:
        return [told + f"No normalisation can be told to let it gain more than {used} does, per unit of step length."]
    best = max(sure, key=lambda method: sure[method]["ahead"])
    one = sure[best]
    return [
        f"{told}Per unit of step length it would gain most by {best}: {one['ahead']:+.2g} +- {one['ahead_error']:.2g} "
        f"more than by {used}."
    ]
