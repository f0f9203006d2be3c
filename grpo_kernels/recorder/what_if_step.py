"""Compares a logged step with the steps of other normalisations, for the log and the file.

Shapes: B sequences of all ranks, P prompts, G completions of one prompt, F reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch

from grpo_kernels.interference.inner_products import InnerProducts
from grpo_kernels.interference.noise import GradientNoise
from grpo_kernels.interference.what_if import Candidate, StepScores, WhatIf, what_if
from grpo_kernels.normalize.methods import METHODS, SHARED_OPTIONS

from .sequence_table import SequenceTable
from .tasks import Tasks

# methods that need no state; decoupled only with several reward functions
STATELESS = tuple(name for name, method in METHODS.items() if method.kind != "state")
# a run's options that the other methods get too, so that two methods differ in nothing else
SHARED = ("eps", "alpha", "k", *SHARED_OPTIONS)
Products = torch.Tensor | InnerProducts
PARTIAL_BATCH = "the step holds a part of the batch"


class WhatIfRow(TypedDict):
    """One normalisation's step compared with the trained one; ``share`` is by prompt, ``tasks`` by task."""

    cos: float
    factor: float
    square: NotRequired[float]  # absent in files of earlier versions
    progress: NotRequired[float]  # absent if raw gradients are unknown, too
    share: list[float]
    tasks: NotRequired[dict[str, dict[str, float]]]


class WhatIfTable(TypedDict):
    """The comparison of a step, as its file holds it: ``what_if.WhatIf`` and ``GradientNoise`` as plain values."""

    used: str | None
    rows: dict[str, WhatIfRow]
    absent: dict[str, str]
    mutual: list[list[float]]
    factors: list[list[float]]
    noise: dict[str, float] | None


def step_scores(gram_BB: Products, sequences: SequenceTable) -> StepScores | None:
    """Returns the scores of the trained step, with those of the extra pass; None without coefficients or advantages."""
    if sequences.coefficient is None or sequences.advantage.isnan().any():
        return None
    _, prompt_B = sequences.prompt_id.unique(return_inverse=True)
    rewards_PG = sequences.group_rewards.new_full(
        (int(prompt_B.max()) + 1, sequences.group_rewards.shape[1]), torch.nan
    )
    rewards_PG[prompt_B] = sequences.group_rewards
    return StepScores(
        gram_BB=gram_BB,
        coefficient_B=sequences.coefficient,
        score_advantage_B=sequences.score_advantage,
        advantage_B=sequences.advantage,
        prompt_B=prompt_B,
        position_B=sequences.position,
        rewards_PG=rewards_PG,
    )


def step_context(
    scores: StepScores, sequences: SequenceTable, function_weights: Sequence[float] | None
) -> dict[str, torch.Tensor]:
    """Returns the ``context`` of ``normalize_rewards``; empty if the step doesn't hold whole groups.

    ``function_weights``: None counts as 1 for each function.
    """
    n_prompts, n_answers = scores.rewards_PG.shape
    n_functions = sequences.function_rewards.shape[1]
    if len(sequences) < n_prompts * n_answers or n_functions == 0:
        return {}
    weights = [1.0] * n_functions if function_weights is None else function_weights
    place = scores.prompt_B, scores.position_B
    lengths_PG = torch.zeros_like(scores.rewards_PG)
    lengths_PG[place] = sequences.length.to(lengths_PG)
    function_PGF = lengths_PG.new_zeros(n_prompts, n_answers, n_functions)
    function_PGF[place] = sequences.function_rewards.to(lengths_PG)
    return {
        "lengths": lengths_PG,
        "function_rewards": function_PGF,
        "prompt_keys": sequences.prompt_key.new_zeros(n_prompts).scatter_(0, scores.prompt_B, sequences.prompt_key),
        "function_weights": lengths_PG.new_tensor(weights),
    }


def step_table(
    scores: StepScores,
    sequences: SequenceTable,
    methods: Sequence[Candidate],
    function_weights: Sequence[float] | None,
    tasks: Tasks,
    *,
    full_batch: bool,
) -> WhatIf:
    """Compares the step with ``methods``.

    ``full_batch``: whether the step holds all prompts of its generation batch; otherwise methods that need the batch's
    statistics are left out.
    """
    left_out = {} if full_batch else {one.name: PARTIAL_BATCH for one in methods if one.needs_batch}
    chosen, tasks_TP = [one for one in methods if one.name not in left_out], tasks.members
    context = step_context(scores, sequences, function_weights)
    table = what_if(scores, chosen, context=context, tasks_TP=tasks_TP.to(scores.prompt_B.device))
    table.absent.update(left_out)
    return table


def as_plain(table: WhatIf, noise: GradientNoise | None, used: str | None, tasks: Tasks) -> WhatIfTable:
    """Returns the comparison as plain values, for JSON; without tasks whose share isn't finite."""
    rows: dict[str, WhatIfRow] = {}
    for name, row in table.rows.items():
        share = [round(value, 5) for value in row.share_P.tolist()]
        rows[name] = {"cos": row.cos, "factor": row.factor, "square": row.square, "share": share}
        if math.isfinite(row.progress):
            rows[name]["progress"] = row.progress
        if tasks.names:
            shares = zip(tasks.names, row.task_share_T.tolist(), strict=True)
            rows[name]["tasks"] = {task: {"share": value} for task, value in shares if math.isfinite(value)}
    return {
        "used": used,
        "rows": rows,
        "absent": table.absent,
        "mutual": table.mutual_MM.tolist(),
        "factors": table.factor_MM.tolist(),
        "noise": None if noise is None else vars(noise),
    }


def comparison_metrics(table: WhatIf, noise: GradientNoise | None) -> dict[str, float]:
    """Returns the metrics ``what_if/<method>/cos``, ``what_if/<method>/factor`` and those under ``noise/``."""
    metrics: dict[str, float] = {}
    for name, row in table.rows.items():
        metrics |= {f"what_if/{name}/cos": row.cos, f"what_if/{name}/factor": row.factor}
    if noise is not None:
        metrics |= {"noise/within": noise.within, "noise/between": noise.between}
        metrics["noise/advised_generations"] = noise.advised
        metrics |= {"noise/advised_low": noise.low, "noise/advised_high": noise.high}
    return metrics
