"""Computes what a report shows of a run, as plain numbers for the page and ``--json``.

Shapes: P prompts of a logged step; L of them live (with a gradient).

At most ``MOST_HEATMAPS`` logged steps of all runs get a heatmap, evenly spaced, with the first and the last; a heatmap
shows at most ``MOST_PROMPTS`` prompts, those with the largest gradients; curves of more than ``MOST_POINTS`` points are
thinned evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from grpo_kernels.interference.curvature import directional_curvature
from grpo_kernels.interference.model_parts import PARTS_OF_MODEL
from grpo_kernels.interference.step_gradients import StepGradients
from trl_ext.recorder.files import InterferenceRecord

from .by_task import tasks
from .completions import read_completions
from .read_run import Run
from .sections import SECTIONS
from .summary import phases, summary, tiles
from .verdicts import diagnose
from .what_if_table import what_if_table

MOST_HEATMAPS, MOST_PROMPTS, MOST_POINTS, MOST_PAIRS = 40, 64, 2000, 5
MORE = {  # numbers without a chart of their own, by section
    "interference": ("interference/live_prompts", "interference/sketch_rmse", "interference/coverage",
                     "interference/sketch_check"),
    "curvature": ("curvature/sigma_mean",),
    "compute": ("compute/tokens_run", "compute/padding_removed_frac", "step_time"),
}  # fmt: skip
TEXT = 120  # characters of a prompt that are shown

# arXiv 2601.23135: Table 1 (correlations), Table 3 (its steps 0, 260, 500)
PAPER = {
    "curvature/fisher_variance_corr": {"same step": 0.342, "across": -0.028},
    "interference/cos_std": {"step 0": 0.045, "step 260": 0.066, "step 500": 0.130},
    "interference/near_orthogonal_frac": {"step 0": 0.977, "step 260": 0.803, "step 500": 0.524},
    "theory/m_bound_p95": {"step 0": 89, "step 260": 250, "step 500": 418},
}


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 to ``count`` - 1, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def curves(run: Run) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Section -> metric -> ``steps`` and ``values``, None where one is missing; without metrics never logged."""
    logged = dict.fromkeys(name for entry in run.logs for name in entry)
    found: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for section, one in SECTIONS.items():
        ordered = sorted(logged) if section == "tasks" else logged  # reward functions in the order of the run's
        names = [*(name for chart in one.curves for name in chart.find(ordered).metrics), *MORE.get(section, ())]
        found[section] = {name: curve for name in names if (curve := _curve(run, name))}
    return found


def _curve(run: Run, name: str) -> dict[str, list[Any]]:
    steps, values = run.curve(name)
    chosen = evenly(len(steps), MOST_POINTS)
    return {"steps": [steps[i] for i in chosen], "values": [values[i] for i in chosen]} if steps else {}


def parts(records: Sequence[InterferenceRecord]) -> dict[str, dict[str, float]]:
    """Part of the model -> means over the logged steps of its share, mean cosine and the cosine's error."""
    found: dict[str, dict[str, float]] = {}
    for name in PARTS_OF_MODEL:
        for key in ("share", "cos_mean", "sketch_rmse"):
            values = [r.metrics[f"parts/{name}/{key}"] for r in records if f"parts/{name}/{key}" in r.metrics]
            if values:
                found.setdefault(name, {"cos_mean": math.nan, "sketch_rmse": 0.0})[key] = float(np.mean(values))
    return found


def what_if(run: Run) -> dict[str, Any] | None:
    """The run's table, or None where no step can be compared."""
    try:
        return what_if_table(run)
    except ValueError:
        return None


def cosines(record: InterferenceRecord) -> tuple[np.ndarray, np.ndarray]:
    """Which prompts of the record are live, (L,), and the cosines of their gradients, (L, L)."""
    square_P = np.diag(record.gram_PP).astype(float)
    live = np.flatnonzero(square_P > 1e-12 * max(square_P.max(initial=0.0), 1e-300))
    norm = np.sqrt(square_P[live])
    matrix = record.gram_PP[np.ix_(live, live)].astype(float) / norm[:, None] / norm
    return live, np.clip(matrix, -1, 1)


def cluster_order(matrix: np.ndarray) -> np.ndarray:
    """An order that puts similar rows next to each other: average linkage on 1 - cosine, leaves in optimal order."""
    if len(matrix) < 3:
        return np.arange(len(matrix))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - matrix, 0, 2)
    np.fill_diagonal(distance, 0)
    condensed = squareform((distance + distance.T) / 2, checks=False)
    return leaves_list(linkage(condensed, "average", optimal_ordering=True))


def prompt_labels(record: InterferenceRecord, places: np.ndarray) -> list[str]:
    """A prompt's text, or its number where no text was kept."""
    texts = record.prompt_text_P or [""] * len(record.prompt_id_P)
    return [" ".join(texts[i].split())[:TEXT] or f"prompt {int(record.prompt_id_P[i])}" for i in places]


def mean_rewards(record: InterferenceRecord, places: np.ndarray) -> list[float | None]:
    """Mean reward of these prompts' scorable answers; None where a prompt has none."""
    found = []
    for prompt in record.prompt_id_P[places]:
        rewards = record.reward_B[(record.prompt_B == prompt) & ~np.isnan(record.reward_B)]
        found.append(round(float(rewards.mean()), 3) if len(rewards) else None)
    return found


def _of_prompts(record: InterferenceRecord, places: np.ndarray) -> dict[str, Any]:
    """What a heatmap and a pair show of their prompts."""
    return {
        "step": record.step,
        "prompts": prompt_labels(record, places),
        "rewards": mean_rewards(record, places),
        "reliability": record.metrics.get("interference/reliability"),
        "sketch_rmse": record.metrics.get("interference/sketch_rmse"),
    }


def heatmap(record: InterferenceRecord) -> dict[str, Any]:
    """One logged step's cosines, ordered by clustering."""
    live, matrix = cosines(record)
    shown = np.arange(len(live))
    if len(live) > MOST_PROMPTS:
        largest = np.argsort(-np.diag(record.gram_PP)[live], kind="stable")[:MOST_PROMPTS]
        shown = np.sort(largest)
    part = matrix[np.ix_(shown, shown)]
    order = cluster_order(part)
    rounded = part[np.ix_(order, order)].round(2).tolist()
    return {"live": len(live), "cosines": rounded, **_of_prompts(record, live[shown[order]])}


def histogram(records: Sequence[InterferenceRecord]) -> dict[str, Any]:
    """Counts the cosines of all pairs of live prompts in bins of 0.02, in the first and last third of the steps."""
    edges = np.linspace(-1, 1, 101)
    third = max(1, len(records) // 3)
    counts = {}
    for name, part in (("first third", records[:third]), ("last third", records[-third:])):
        told = [r.metrics["interference/reliability"] for r in part if "interference/reliability" in r.metrics]
        name += f" (reliability {np.mean(told):.2f})" if told else ""
        values = [matrix[np.triu_indices(len(matrix), 1)] for _, matrix in map(cosines, part)]
        counts[name] = np.histogram(np.concatenate([*values, np.empty(0)]), edges)[0].tolist()
    errors = [r.metrics["interference/sketch_rmse"] for r in records if "interference/sketch_rmse" in r.metrics]
    rmse = float(np.mean(errors)) if errors else None
    return {"edges": edges.round(2).tolist(), "counts": counts, "sketch_rmse": rmse}


def extreme_pairs(records: Sequence[InterferenceRecord]) -> dict[str, list[dict[str, Any]]]:
    """The pairs of prompts that conflict and that agree most, of all logged steps."""
    found: list[dict[str, Any]] = []
    for record in records:
        live, matrix = cosines(record)
        if len(live) < 2:
            continue
        rows, columns = np.triu_indices(len(live), 1)
        values = matrix[rows, columns]
        order = np.argsort(values, kind="stable")
        for place in {*order[:MOST_PAIRS].tolist(), *order[-MOST_PAIRS:].tolist()}:
            pair = live[[rows[place], columns[place]]]
            found.append({"cosine": round(float(values[place]), 3), **_of_prompts(record, pair)})
    found.sort(key=lambda pair: pair["cosine"])
    return {
        "conflict": [pair for pair in found[:MOST_PAIRS] if pair["cosine"] < 0],
        "agree": [pair for pair in found[::-1][:MOST_PAIRS] if pair["cosine"] > 0],
    }


def sigma_and_curvature(records: Sequence[InterferenceRecord]) -> list[dict[str, Any]]:
    """Sigma and measured curvature along its own gradient, of each prompt and logged step where both are defined."""
    points = []
    for record in records:
        if record.gram_BB is None or record.coefficient_B is None:
            continue
        step = StepGradients(
            gram_BB=torch.from_numpy(record.gram_BB),
            prompt_B=torch.from_numpy(record.prompt_B),
            reward_B=torch.from_numpy(record.reward_B),
            coefficient_B=torch.from_numpy(record.coefficient_B),
            baseline_size=0,
        )
        sigma = dict(zip(record.prompt_id_P.tolist(), record.sigma_P.tolist(), strict=True))
        prompts, curvature = directional_curvature(step)
        points += [
            {"step": record.step, "sigma": sigma[prompt], "curvature": value}
            for prompt, value in zip(prompts.tolist(), curvature.tolist(), strict=True)
            if math.isfinite(value)
        ]
    return [points[i] for i in evenly(len(points), MOST_POINTS)]


def notes(run: Run) -> list[str]:
    """Explains steps that were evaluated more than once."""
    return [
        f"Step {step} was evaluated {len(values)} times ({', '.join(f'{value:.3f}' for value in values)}): answers are "
        "sampled, so even the same model gives different accuracies. The curve has their mean."
        for step, values in run.evaluated_again().items()
    ]


def report_numbers(run: Run, n_runs: int = 1) -> dict[str, Any]:
    """Everything that the page and ``--json`` show; ``n_runs`` share the page's heatmaps."""
    with_pairs = [record for record in run.records if len(cosines(record)[0]) > 1]
    chosen = [with_pairs[i] for i in evenly(len(with_pairs), max(2, MOST_HEATMAPS // n_runs))]
    compared = what_if(run)
    found: dict[str, Any] = {
        "run": run.name,
        "last_step": run.last_step,
        "logged_interference_steps": len(run.records),
        "most_prompts": MOST_PROMPTS,
        "summary": summary(run),
        "tiles": tiles(run, compared),
        "diagnosis": diagnose(run).as_plain(),
        "problems": run.problems,
        "notes": notes(run),
        "config": run.config,
        "phases": phases(run),
        "curves": curves(run),
        "heatmaps": [heatmap(record) for record in chosen],
        "histogram": histogram(run.records) if chosen else None,
        "pairs": extreme_pairs(run.records),
        "what_if": compared,
        "parts": parts(run.records),
        "tasks": tasks(run),
        "completions": read_completions(run.folder),
        "sigma_and_curvature": sigma_and_curvature(run.records),
        "paper": PAPER,
    }
    return finite(found)


def finite(value: Any) -> Any:
    """Puts None in place of NaN and infinity, which JSON doesn't have."""
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
