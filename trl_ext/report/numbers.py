"""Computes what a report shows of a run, as plain numbers for the page and ``--json``.

Shapes: P prompts of a logged step; L of them live (with a gradient).

At most ``MOST_HEATMAPS`` logged steps of all runs get a heatmap, evenly spaced, with the first and the last; a heatmap
shows at most ``MOST_PROMPTS`` prompts, those with the largest gradients; curves of more than ``MOST_POINTS`` points are
thinned evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from grpo_kernels.interference.curvature import directional_curvature
from grpo_kernels.interference.model_parts import PARTS_OF_MODEL
from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.recorder.files import InterferenceRecord

from .by_task import TaskTable, tasks
from .completions import SampledAnswer, read_completions
from .first_screen import FirstScreen, first_screen
from .next_experiment import untried
from .read_run import Curve, Run
from .run_files import Configuration
from .sections import MAIN_CHART, SECTIONS
from .theory import Span, phases, theory
from .verdicts import Diagnosis, diagnose
from .what_if_table import WhatIfTable, what_if_table

MOST_HEATMAPS, MOST_PROMPTS, MOST_POINTS, MOST_PAIRS = 40, 64, 2000, 5
MORE = {  # numbers without a chart of their own, by section
    "interference": tuple(
        f"interference/{name}" for name in ("live_prompts", "sketch_rmse", "coverage", "sketch_check")
    ),
    "curvature": ("curvature/sigma_mean",),
    "compute": ("compute/tokens_run", "compute/padding_removed_frac", "step_time"),
}
TEXT = 120  # characters of a prompt that are shown

# arXiv 2601.23135: Table 1 (correlations), Table 3 (its steps 0, 260, 500)
PAPER: dict[str, dict[str, float]] = {
    "curvature/fisher_variance_corr": {"same step": 0.342, "across": -0.028},
    "interference/cos_std": {"step 0": 0.045, "step 260": 0.066, "step 500": 0.130},
    "interference/near_orthogonal_frac": {"step 0": 0.977, "step 260": 0.803, "step 500": 0.524},
    "theory/m_bound_p95": {"step 0": 89, "step 260": 250, "step 500": 418},
}


@dataclass(frozen=True)
class Prompts:
    """Some prompts of a logged step: their texts and mean rewards, and the error of the step's cosines."""

    step: int
    prompts: list[str]
    rewards: list[float | None]
    sketch_rmse: float | None


@dataclass(frozen=True, kw_only=True)
class Heatmap(Prompts):
    """Cosines of a logged step, of ``live`` prompts in all."""

    live: int
    cosines: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Pair(Prompts):
    """Two prompts of a logged step."""

    cosine: float


@dataclass(frozen=True)
class Histogram:
    """``counts``: label of a part of the run -> pairs in each bin."""

    edges: list[float]
    counts: dict[str, list[int]]
    sketch_rmse: float | None


@dataclass(frozen=True)
class PromptCurvature:
    """Sigma and measured curvature along its own gradient, of one prompt of a logged step."""

    step: int
    sigma: float
    curvature: float


@dataclass(frozen=True)
class PartOfModel:
    """Means over the logged steps."""

    cos_mean: float
    sketch_rmse: float
    share: float


@dataclass(frozen=True)
class ReportNumbers:
    """Everything that the page and ``--json`` show of a run. ``curves``: section -> metric -> curve."""

    run: str
    last_step: int
    logged_interference_steps: int
    most_prompts: int
    screen: FirstScreen
    theory: list[str]
    diagnosis: Diagnosis
    problems: list[str]
    notes: list[str]
    config: Configuration
    phases: list[Span]
    curves: dict[str, dict[str, Curve]]
    heatmaps: list[Heatmap]
    histogram: Histogram | None
    pairs: dict[str, list[Pair]]
    what_if: WhatIfTable | None
    parts: dict[str, PartOfModel]
    tasks: TaskTable | None
    completions: list[SampledAnswer]
    sigma_and_curvature: list[PromptCurvature]
    paper: dict[str, dict[str, float]]


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 to ``count`` - 1, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def curves(run: Run) -> dict[str, dict[str, Curve]]:
    """Section, or "main" for the large chart -> metric -> curve, without metrics never logged."""
    logged = dict.fromkeys(name for entry in run.logs for name in entry)
    main = {name: curve for name in MAIN_CHART.metrics if (curve := _thinned(run.curve(name))).steps}
    found: dict[str, dict[str, Curve]] = {"main": main}
    for section, one in SECTIONS.items():
        ordered = sorted(logged) if section == "tasks" else logged  # reward functions in the order of the run's
        names = [*(name for chart in one.curves for name in chart.find(ordered).metrics), *MORE.get(section, ())]
        found[section] = {name: curve for name in names if (curve := _thinned(run.curve(name))).steps}
    return found


def _thinned(curve: Curve) -> Curve:
    chosen = evenly(len(curve.steps), MOST_POINTS)
    return Curve([curve.steps[i] for i in chosen], [curve.values[i] for i in chosen])


def mean_metric(records: Sequence[InterferenceRecord], name: str) -> float | None:
    """Over the records that have it."""
    values = [record.metrics[name] for record in records if name in record.metrics]
    return float(np.mean(values)) if values else None


def parts(records: Sequence[InterferenceRecord]) -> dict[str, PartOfModel]:
    """By name, of the parts of the model whose share is logged."""
    found = {}
    for name in PARTS_OF_MODEL:
        share, cosine, error = (mean_metric(records, f"parts/{name}/{k}") for k in ("share", "cos_mean", "sketch_rmse"))
        if share is not None:
            found[name] = PartOfModel(math.nan if cosine is None else cosine, error or 0.0, share)
    return found


def what_if(run: Run) -> WhatIfTable | None:
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


def prompts_at(record: InterferenceRecord, places: np.ndarray) -> Prompts:
    """These prompts of the record."""
    rmse = record.metrics.get("interference/sketch_rmse")
    return Prompts(record.step, prompt_labels(record, places), mean_rewards(record, places), rmse)


def heatmap(record: InterferenceRecord) -> Heatmap:
    """One logged step's cosines, ordered by clustering."""
    live, matrix = cosines(record)
    shown = np.arange(len(live))
    if len(live) > MOST_PROMPTS:
        largest = np.argsort(-np.diag(record.gram_PP)[live], kind="stable")[:MOST_PROMPTS]
        shown = np.sort(largest)
    part = matrix[np.ix_(shown, shown)]
    order = cluster_order(part)
    rounded = part[np.ix_(order, order)].round(2).tolist()
    return Heatmap(live=len(live), cosines=rounded, **vars(prompts_at(record, live[shown[order]])))


def histogram(records: Sequence[InterferenceRecord]) -> Histogram:
    """Counts the cosines of all pairs of live prompts in bins of 0.02, in the first and last third of the steps."""
    edges = np.linspace(-1, 1, 101)
    third = max(1, len(records) // 3)
    counts = {}
    for name, part in (("first third", records[:third]), ("last third", records[-third:])):
        values = [matrix[np.triu_indices(len(matrix), 1)] for _, matrix in map(cosines, part)]
        counts[name] = np.histogram(np.concatenate([*values, np.empty(0)]), edges)[0].tolist()
    return Histogram(edges.round(2).tolist(), counts, mean_metric(records, "interference/sketch_rmse"))


def extreme_pairs(records: Sequence[InterferenceRecord]) -> dict[str, list[Pair]]:
    """Those that "conflict" and those that "agree" most, of all logged steps."""
    found: list[Pair] = []
    for record in records:
        live, matrix = cosines(record)
        if len(live) < 2:
            continue
        rows, columns = np.triu_indices(len(live), 1)
        values = matrix[rows, columns]
        order = np.argsort(values, kind="stable")
        for place in {*order[:MOST_PAIRS].tolist(), *order[-MOST_PAIRS:].tolist()}:
            both = prompts_at(record, live[[rows[place], columns[place]]])
            found.append(Pair(cosine=round(float(values[place]), 3), **vars(both)))
    found.sort(key=lambda pair: pair.cosine)
    conflict = [pair for pair in found[:MOST_PAIRS] if pair.cosine < 0]
    return {"conflict": conflict, "agree": [pair for pair in found[::-1][:MOST_PAIRS] if pair.cosine > 0]}


def sigma_and_curvature(records: Sequence[InterferenceRecord]) -> list[PromptCurvature]:
    """Of each prompt and logged step where both are defined."""
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
            PromptCurvature(record.step, sigma[prompt], value)
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


def report_numbers(run: Run, n_runs: int = 1) -> ReportNumbers:
    """``n_runs`` share the page's heatmaps."""
    with_pairs = [record for record in run.records if len(cosines(record)[0]) > 1]
    chosen = [with_pairs[i] for i in evenly(len(with_pairs), max(2, MOST_HEATMAPS // n_runs))]
    compared, diagnosis = what_if(run), diagnose(run)
    numbers = ReportNumbers(
        run=run.name,
        last_step=run.last_step,
        logged_interference_steps=len(run.records),
        most_prompts=MOST_PROMPTS,
        screen=first_screen(run, diagnosis),
        theory=theory(run),
        diagnosis=diagnosis,
        problems=run.problems,
        notes=notes(run),
        config=run.config,
        phases=phases(run),
        curves=curves(run),
        heatmaps=[heatmap(record) for record in chosen],
        histogram=histogram(run.records) if chosen else None,
        pairs=extreme_pairs(run.records),
        what_if=compared,
        parts=parts(run.records),
        tasks=tasks(run),
        completions=read_completions(run.folder),
        sigma_and_curvature=sigma_and_curvature(run.records),
        paper=PAPER,
    )
    return finite(numbers)


def untried_only(numbers: Sequence[ReportNumbers]) -> list[ReportNumbers]:
    """Leaves suggestions out that another of the runs has tried."""
    found = []
    for one in numbers:
        others = [other.config for other in numbers if other is not one]
        changes = untried(one.screen.changes, others)
        found.append(replace(one, screen=replace(one.screen, changes=changes)))
    return found


def finite(value: Any) -> Any:
    """Puts None in place of NaN and infinity, which JSON doesn't have."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: finite(getattr(value, one.name)) for one in fields(value)})
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
