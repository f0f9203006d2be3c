"""A run's interference files -> what every normalisation would have made of its steps, pooled over steps.

Shapes: B sequences, P prompts, G completions of one prompt; M normalisations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from grpo_kernels.interference.noise import advised_generations, gradient_noise
from grpo_kernels.interference.what_if import Candidate, StepScores, candidates
from grpo_kernels.normalize.methods import METHODS
from trl_ext.options import SCALE_REWARDS_METHOD
from trl_ext.recorder.files import InterferenceRecord
from trl_ext.recorder.sequence_table import SequenceTable
from trl_ext.recorder.task_interference import Tasks
from trl_ext.recorder.what_if import STATELESS, as_plain, step_scores, step_table

from .read_run import Run

SAME_COSINE, SAME_SPREAD = 0.99, 0.1  # methods are one where steps are so alike, and their lengths' ratio so steady
STEADY = 0.15  # std of the log of a factor up to which it is a learning rate
DRAWS = 500  # of steps, for the interval of the advised G


def used_normalization(config: Mapping[str, Any]) -> str | None:
    """The run's, where it is in the catalogue and needs no state and no more than the summed rewards."""
    if not config:
        return None  # nobody knows
    if config.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        return None
    name = config.get("normalization") or SCALE_REWARDS_METHOD.get(config.get("scale_rewards", "group"))
    return name if isinstance(name, str) and name in STATELESS else None


def given_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the run's normalisation; a function's are its own."""
    name = config.get("normalization") or "std"
    options = config.get("normalization_kwargs") if isinstance(name, str) and name in METHODS else None
    return {name: options[name] for name in ("eps", "alpha") if name in options} if isinstance(options, dict) else {}


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


def what_if_table(run: Run, methods: Sequence[Any] | None = None) -> dict[str, Any]:
    """Everything that the command prints, as JSON holds it.

    ``methods``: names and functions; None: all in the catalogue that need no state. Raises ``ValueError`` where no step
    can be compared, with the reason.
    """
    used, options = used_normalization(run.config), given_options(run.config)
    own = candidates([used], **options)[0] if used is not None else None
    chosen = candidates(list(STATELESS if methods is None else methods), **options)
    rollouts, generations = (int(run.config.get(key) or 0) for key in ("generation_batch_size", "num_generations"))
    n_prompts = rollouts // generations if rollouts and generations else None
    weights = run.config.get("reward_weights")
    weights = weights if _are_numbers(weights) else None
    steps: list[tuple[int, Any]] = []
    skipped: dict[str, int] = {}
    for record in run.records:
        found = record_scores(record, own)
        if isinstance(found, str):
            if record.what_if is not None and methods is None:  # a large step's was kept
                steps.append((record.step, record.what_if))
            else:
                skipped[found] = skipped.get(found, 0) + 1
            continue
        scores, sequences = found
        here = chosen
        if sequences.function_rewards.shape[1] < 2:
            here = [one for one in chosen if one.name != "decoupled" or methods is not None]
        whole = n_prompts is None or len(scores.rewards_PG) == n_prompts
        tasks = Tasks.named(record.task_P or [""] * len(scores.rewards_PG))
        table = step_table(scores, sequences, here, weights, tasks, full_batch=whole)
        steps.append((record.step, as_plain(table, gradient_noise(scores), used, tasks)))
    if not any(table["rows"] for _, table in steps):
        reasons = "; ".join(skipped) or "; ".join({r for _, table in steps for r in table["absent"].values()})
        raise ValueError(f"no step of {run.name} can be compared: {reasons or 'it logged no interference'}")
    return {
        "run": run.name, "used": used, "steps": [step for step, _ in steps], "skipped": skipped,
        "optimizer": run.config.get("optim"), "methods": _pooled([table for _, table in steps]),
        "same": _same([table for _, table in steps]), "absent": _absent([table for _, table in steps]),
        "noise": _noise([table["noise"] for _, table in steps if table["noise"]], run.config),
    }  # fmt: skip


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _pooled(tables: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    pooled: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for table in tables for name in table["rows"]):
        rows = [table["rows"][name] for table in tables if name in table["rows"]]
        factors = [row["factor"] for row in rows]
        spread = None  # to four places: the factor of what was trained with is 1 to rounding
        if len(rows) > 1 and min(factors) > 0:
            spread = round(float(np.std(np.log(factors), ddof=1)), 4)
        one: dict[str, Any] = {
            "steps": len(rows), "cos": float(np.mean([row["cos"] for row in rows])),
            "factor": float(np.median(factors)), "factor_low": min(factors), "factor_high": max(factors),
            "spread": spread, "kind": None,
        }  # fmt: skip
        if len(rows) > 1:
            one["kind"] = "rate" if spread is not None and spread <= STEADY else "schedule"
        if tasks := _pooled_tasks(rows):
            one["tasks"] = tasks
        pooled[name] = one
    return pooled


def _pooled_tasks(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each task's mean share of the step, over the steps that have the task, and its standard error."""
    pooled: dict[str, dict[str, Any]] = {}
    for name in sorted({name for row in rows for name in row.get("tasks", {})}):
        found = [row["tasks"][name] for row in rows if name in row.get("tasks", {})]
        shares = [one["share"] for one in found if "share" in one]
        if shares:
            error = float(np.std(shares, ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else None
            pooled[name] = {"share": float(np.mean(shares)), "share_error": error}
    return pooled


def _same(tables: list[dict[str, Any]]) -> list[list[str]]:
    """Groups of methods that are one here: single links of steps alike, with a steady ratio of lengths."""
    names = list(dict.fromkeys(name for table in tables for name in table["rows"]))
    group = {name: {name} for name in names}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            cosines, ratios = [], []
            for table in tables:
                order = list(table["rows"])
                if one in order and other in order:
                    a, b = order.index(one), order.index(other)
                    cosines.append(table["mutual"][a][b])
                    ratios.append(math.log(table["factors"][a][b]))
            if cosines and np.mean(cosines) >= SAME_COSINE and np.std(ratios) <= SAME_SPREAD:
                joined = group[one] | group[other]
                for name in joined:
                    group[name] = joined
    found: list[list[str]] = []
    for name in names:
        members = [other for other in names if other in group[name]]
        if len(members) > 1 and members not in found:
            found.append(members)
    return found


def _absent(tables: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """By method: in how many steps it can't be told, and the latest reason."""
    found: dict[str, list[Any]] = {}
    for table in tables:
        for name, reason in table["absent"].items():
            found[name] = [found.get(name, [0])[0] + 1, reason]
    return found


def _noise(steps: list[dict[str, float]], config: Mapping[str, Any]) -> dict[str, float] | None:
    """Pooled: means over steps; the advised G's interval of 90 % by resampling steps."""
    if not steps:
        return None
    values = np.array([[one["between"], one["within"], one["pairs"]] for one in steps])
    most = int(config.get("generation_batch_size") or 0) or 10**6
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    advised = [advised_generations(pairs, between, most) for between, _, pairs in values[drawn].mean(1)]
    between, within, pairs = values.mean(0)
    low, high = np.quantile(advised, [0.05, 0.95])
    return {
        "steps": len(values), "between": float(between), "within": float(within), "pairs": float(pairs),
        "advised": advised_generations(float(pairs), float(between), most), "low": float(low), "high": float(high),
    }  # fmt: skip
