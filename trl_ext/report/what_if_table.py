"""A run's interference files -> what every normalisation would have made of its steps, pooled over steps.

Shapes: B sequences, P prompts, G completions of one prompt; M normalisations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch

from grpo_kernels.interference.noise import advised_generations, gradient_noise
from grpo_kernels.interference.what_if import Candidate, StepScores, candidates
from grpo_kernels.normalize.methods import METHODS
from grpo_kernels.recorder.files import InterferenceRecord
from grpo_kernels.recorder.sequence_table import SequenceTable
from grpo_kernels.recorder.tasks import Tasks
from grpo_kernels.recorder.what_if_step import SHARED, STATELESS, as_plain, step_scores, step_table
from trl_ext.options import SCALE_REWARDS_METHOD

from .read_run import Run
from .run_files import Configuration

SAME_COSINE, SAME_SPREAD = 0.99, 0.1  # methods are one where steps are so alike, and their lengths' ratio so steady
STEADY = 0.15  # std of the log of a factor up to which it is a learning rate
STEADY_BLIND = ("adam", "paged_adam", "lion")  # optimizers that take no notice of a steady factor
DRAWS = 500  # of steps, for intervals
REFERENCE, FEWEST_STEPS = "std", 3  # of rates


class StepRow(TypedDict):
    """One method in one step; ``tasks``: name -> ``{"share": share of the step}``."""

    cos: float
    factor: float
    square: NotRequired[float]
    progress: NotRequired[float]
    tasks: NotRequired[dict[str, dict[str, float]]]


class StepTable(TypedDict):
    """One step's comparison, as ``what_if_step.as_plain`` makes it and files keep it. ``mutual`` and ``factors``:
    cosines and ratios of lengths of each two methods, in the order of ``rows``."""

    rows: dict[str, StepRow]
    absent: dict[str, str]
    mutual: list[list[float]]
    factors: list[list[float]]
    noise: dict[str, float] | None


@dataclass(frozen=True)
class TaskShare:
    """A task's mean share of the step over the steps that have it, and its standard error."""

    share: float
    share_error: float | None


@dataclass(frozen=True)
class Rate:
    """A best learning rate over ``std``'s, with its 95 % interval by resampling steps."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Method:
    """One method over all steps: mean cosine, median factor, std of its log; ``rate``: None where it can't be told."""

    steps: int
    cos: float
    rate: Rate | None
    factor: float
    spread: float | None
    kind: str | None  # "rate" or "schedule"
    tasks: dict[str, TaskShare]


@dataclass(frozen=True)
class Noise:
    """Means over steps; ``advised`` answers to a prompt with the interval ``low`` to ``high``, 90 % by resampling."""

    steps: int
    between: float
    within: float
    pairs: float
    advised: float
    low: float
    high: float


@dataclass(frozen=True)
class WhatIfTable:
    """``skipped``: reason -> steps; ``same``: groups of methods that differ by a learning rate alone; ``absent``:
    method -> in how many steps it can't be computed, and the latest reason."""

    run: str
    used: str | None
    steps: list[int]
    skipped: dict[str, int]
    optimizer: str | None
    methods: dict[str, Method]
    same: list[list[str]]
    absent: dict[str, tuple[int, str]]
    noise: Noise | None

    @property
    def by_cosine(self) -> list[tuple[str, Method]]:
        return sorted(self.methods.items(), key=lambda item: -item[1].cos)

    @property
    def ignores_a_steady_factor(self) -> bool:
        return str(self.optimizer or "").startswith(STEADY_BLIND)

    def remarks(self) -> list[str]:
        """What cosines and rates mean for this run's optimizer, and which methods are one."""
        same = [f"One and the same here, but for a learning rate: {', '.join(group)}." for group in self.same]
        if self.ignores_a_steady_factor:
            return [f"{self.optimizer} takes no notice of a factor that stays the same.", *same]
        return same


def used_normalization(config: Configuration) -> str | None:
    """The run's, where it is in the catalogue and needs no state and no more than the summed rewards."""
    if not config:
        return None  # nobody knows
    if config.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        return None
    name = config.get("normalization") or SCALE_REWARDS_METHOD.get(config.get("scale_rewards", "group"))
    return name if isinstance(name, str) and name in STATELESS else None


def given_options(config: Configuration) -> dict[str, float]:
    """Of the run's normalisation; a function's are its own."""
    name = config.get("normalization") or "std"
    options = config.get("normalization_kwargs") if isinstance(name, str) and name in METHODS else None
    return {name: options[name] for name in SHARED if name in options} if isinstance(options, dict) else {}


def record_scores(record: InterferenceRecord, used: Candidate | None) -> tuple[StepScores, SequenceTable] | str:
    """A file's scores and sequences, or why it has none. Earlier versions' lack advantages: ``used`` makes them."""
    if record.coefficient_B is None:
        return "its sequences have no single coefficient (off policy, KL, an entropy bonus or mask)"
    if record.gram_BB is None:
        return "only products of prompts are kept"
    try:
        record = _with_advantages(record, used)
        sequences = record.sequences()
        assert sequences is not None
        gram_BB = record.gram_BB if record.scores_BB is None else record.scores_BB
        scores = step_scores(torch.from_numpy(gram_BB), sequences)
    except ValueError as error:
        return str(error)
    return "its tokens have advantages of their own" if scores is None else (scores, sequences)


def _with_advantages(record: InterferenceRecord, used: Candidate | None) -> InterferenceRecord:
    """The same, with the advantages that ``used`` makes where an earlier version kept none; else ``ValueError``."""
    if record.sequences() is not None:
        return record
    row_B = np.searchsorted(record.prompt_id_P, record.prompt_B)
    sizes = np.bincount(row_B)
    if not (sizes == sizes[0]).all():
        raise ValueError("it holds parts of groups, and its file is an earlier version's")
    if used is None:
        reason = "the run's normalisation can't be made again from rewards"
        raise ValueError(f"its file is an earlier version's, and {reason}")
    position_B = np.empty_like(row_B)
    position_B[row_B.argsort(kind="stable")] = np.arange(len(row_B)) % sizes[0]
    rewards_PG = np.empty((len(sizes), sizes[0]))
    rewards_PG[row_B, position_B] = record.reward_B
    advantage_B = used.advantages(torch.from_numpy(rewards_PG), {}).numpy()[row_B, position_B]
    coefficient_B = (advantage_B != 0) * record.coefficient_B
    return replace(
        record, position_B=position_B, rewards_PG=rewards_PG, advantage_B=advantage_B, coefficient_B=coefficient_B
    )


def what_if_table(run: Run, methods: Sequence[Any] | None = None) -> WhatIfTable:
    """Compares the run's steps with those of other normalisations.

    ``methods``: names and functions; None: all in the catalogue that need no state. Raises ``ValueError`` where no step
    can be compared, with the reason.
    """
    used, options = used_normalization(run.config), given_options(run.config)
    own = candidates([used], **options)[0] if used is not None else None
    chosen = candidates(list(STATELESS if methods is None else methods), **options)
    steps: dict[int, StepTable] = {}
    skipped: dict[str, int] = {}
    for record in run.records:
        found = record_scores(record, own)
        if not isinstance(found, str):
            one_function = methods is None and found[1].function_rewards.shape[1] < 2
            here = [one for one in chosen if one.name != "decoupled"] if one_function else chosen
            steps[record.step] = _step_table(record, *found, here, used, run.config)
        elif record.what_if is not None and methods is None:  # a large step's was kept
            steps[record.step] = cast(StepTable, record.what_if)
        else:
            skipped[found] = skipped.get(found, 0) + 1
    tables = list(steps.values())
    if not any(table["rows"] for table in tables):
        reasons = "; ".join(skipped) or "; ".join({reason for table in tables for reason in table["absent"].values()})
        raise ValueError(f"no step of {run.name} can be compared: {reasons or 'it logged no interference'}")
    return WhatIfTable(
        run=run.name,
        used=used,
        steps=list(steps),
        skipped=skipped,
        optimizer=run.config.get("optim"),
        methods=_pooled(tables, pooled_rates(tables)),
        same=_same(tables),
        absent=_absent(tables),
        noise=_noise([table["noise"] for table in tables if table["noise"]], run.config),
    )


def _step_table(
    record: InterferenceRecord,
    scores: StepScores,
    sequences: SequenceTable,
    methods: Sequence[Candidate],
    used: str | None,
    config: Configuration,
) -> StepTable:
    rollouts, generations = (int(config.get(key) or 0) for key in ("generation_batch_size", "num_generations"))
    whole = not (rollouts and generations) or len(scores.rewards_PG) == rollouts // generations
    weights = config.get("reward_weights")
    weights = weights if isinstance(weights, list) and all(isinstance(one, int | float) for one in weights) else None
    tasks = Tasks.named(record.task_P or [""] * len(scores.rewards_PG))
    table = step_table(scores, sequences, methods, weights, tasks, full_batch=whole)
    return cast(StepTable, as_plain(table, gradient_noise(scores), used, tasks))


def pooled_rates(tables: Sequence[StepTable]) -> dict[str, Rate]:
    """Returns each method's best learning rate over that of ``std``, if curvature is the same in all directions::

        rate_m = (sum_t progress_m,t / sum_t |u_m,t|^2) / (the same of std)

    over the steps t that have both. A method is left out with fewer than three such steps, and where the 95 % interval
    of its summed progress or of ``std``'s holds 0: its step isn't known to gain anything then.
    """
    found = {}
    for name in dict.fromkeys(name for table in tables for name in table["rows"]):
        both = [
            (table["rows"][name], table["rows"][REFERENCE]) for table in tables if {name, REFERENCE} <= {*table["rows"]}
        ]
        values = [[one.get("progress"), one.get("square"), std.get("progress"), std.get("square")] for one, std in both]
        values_T4 = np.array([one for one in values if None not in one], dtype=float).reshape(-1, 4)
        values_T4 = values_T4[np.isfinite(values_T4).all(1)]
        if len(values_T4) < FEWEST_STEPS:
            continue
        drawn = np.random.default_rng(0).integers(len(values_T4), size=(DRAWS, len(values_T4)))
        sums_D4 = values_T4[drawn].sum(1)
        if (np.quantile(sums_D4[:, [0, 2]], 0.025, axis=0) <= 0).any():
            continue
        own, square, reference, reference_square = np.vstack([values_T4.sum(0), sums_D4]).T
        rates = (own / square) / np.where(reference > 0, reference / reference_square, np.nan)
        low, high = np.nanquantile(rates[1:], [0.025, 0.975]).tolist()
        found[name] = Rate(float(rates[0]), low, high)
    return found


def _pooled(tables: Sequence[StepTable], rates: Mapping[str, Rate]) -> dict[str, Method]:
    names = dict.fromkeys(name for table in tables for name in table["rows"])
    rows = {name: [table["rows"][name] for table in tables if name in table["rows"]] for name in names}
    return {name: _pooled_method(rows[name], rates.get(name)) for name in names}


def _pooled_method(rows: Sequence[StepRow], rate: Rate | None) -> Method:
    factors = [row["factor"] for row in rows]
    spread = kind = None
    if len(rows) > 1:
        if min(factors) > 0:  # to four places: the factor of what was trained with is 1 to rounding
            spread = round(float(np.std(np.log(factors), ddof=1)), 4)
        kind = "rate" if spread is not None and spread <= STEADY else "schedule"
    return Method(
        steps=len(rows),
        cos=float(np.mean([row["cos"] for row in rows])),
        rate=rate,
        factor=float(np.median(factors)),
        spread=spread,
        kind=kind,
        tasks=_pooled_tasks(rows),
    )


def _pooled_tasks(rows: Sequence[StepRow]) -> dict[str, TaskShare]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        for name, one in row.get("tasks", {}).items():
            if "share" in one:
                shares.setdefault(name, []).append(one["share"])
    errors = {name: float(np.std(s, ddof=1)) / math.sqrt(len(s)) for name, s in shares.items() if len(s) > 1}
    return {name: TaskShare(float(np.mean(shares[name])), errors.get(name)) for name in sorted(shares)}


def _same(tables: Sequence[StepTable]) -> list[list[str]]:
    """Groups of methods that are one here: single links of steps alike, with a steady ratio of lengths."""
    names = list(dict.fromkeys(name for table in tables for name in table["rows"]))
    group = {name: {name} for name in names}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if _alike(tables, one, other):
                joined = group[one] | group[other]
                group.update(dict.fromkeys(joined, joined))
    members = ([other for other in names if other in group[name]] for name in names)
    return [list(one) for one in dict.fromkeys(map(tuple, members)) if len(one) > 1]


def _alike(tables: Sequence[StepTable], one: str, other: str) -> bool:
    cosines, ratios = [], []
    for table in tables:
        if one in table["rows"] and other in table["rows"]:
            a, b = (list(table["rows"]).index(name) for name in (one, other))
            cosines.append(table["mutual"][a][b])
            ratios.append(math.log(table["factors"][a][b]))
    return bool(cosines) and bool(np.mean(cosines) >= SAME_COSINE and np.std(ratios) <= SAME_SPREAD)


def _absent(tables: Sequence[StepTable]) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for table in tables:
        for name, reason in table["absent"].items():
            found[name] = found.get(name, (0, ""))[0] + 1, reason
    return found


def _noise(steps: Sequence[Mapping[str, float]], config: Configuration) -> Noise | None:
    if not steps:
        return None
    values = np.array([[one["between"], one["within"], one["pairs"]] for one in steps])
    most = int(config.get("generation_batch_size") or 0) or 10**6
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    advised = [advised_generations(pairs, between, most) for between, _, pairs in values[drawn].mean(1)]
    between, within, pairs = values.mean(0).tolist()
    low, high = np.quantile(advised, [0.05, 0.95]).tolist()
    return Noise(len(values), between, within, pairs, advised_generations(pairs, between, most), low, high)
