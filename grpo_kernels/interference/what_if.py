"""Compares the step that was trained with the step that every other normalisation would have taken.

Shapes: B sequences, P prompts, G completions of one prompt, M normalisations, T tasks.

On policy a sequence contributes u_i = c_i s_i to the gradient of the loss, c_i = -A_i w_i: advantage A_i, weight w_i,
score s_i = grad log pi(o_i | q_p). Another normalisation m changes A_i alone, so u_m,i = (A_m,i / A_i) u_i, and
everything below follows from the inner products of the u_i:

* cos_m = <u_m, u> / (|u_m| |u|), u_m the sum over sequences: how much of m is another direction.
* factor_m = <u_m, u> / |u|^2: the factor on the learning rate that the rest of it is. A factor that is the same at
  every step is a learning rate, one that moves is a schedule.
* share_P: <u_m,p, u_m> / |u_m|^2, each prompt's share of the step; sums to 1, below 0 for a prompt that the step goes
  against. A task's share is the sum over its prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.normalize.methods import METHODS, check_normalization, function_name
from grpo_kernels.normalize.rewards import normalize_rewards

from .inner_products import InnerProducts, as_products

VANISHED = 1e-7  # a squared length below this share of what was summed is rounding
ALPHA = 0.5  # of power, where none is given

Normalise = Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class StepScores:
    """A step's scores, as far as they are known, and the rewards that advantages are made of.

    ``gram_BB``: inner products of z_i = c_i s_i, as in ``StepGradients``. ``coefficient_B``: c_i, 0 where the score
    isn't known. ``made_at_B``: the advantage within c_i, so that c_i / -made_at_i is the weight; in a row of the step
    itself that is ``advantage_B``, what was trained with, which is 0 where a sequence was scored beside the step.
    ``prompt_B`` in [0, P) and ``position_B`` in [0, G): the place in ``rewards_PG``, whole groups, NaN where
    unscorable; the step may hold a part of them.
    """

    gram_BB: torch.Tensor | InnerProducts
    coefficient_B: torch.Tensor
    made_at_B: torch.Tensor
    advantage_B: torch.Tensor
    prompt_B: torch.Tensor
    position_B: torch.Tensor
    rewards_PG: torch.Tensor

    def __post_init__(self) -> None:
        size = len(self.gram_BB)
        if isinstance(self.gram_BB, torch.Tensor) and tuple(self.gram_BB.shape) != (size, size):
            raise ValueError(f"gram_BB has shape {tuple(self.gram_BB.shape)}: expected a square (B, B)")
        for name in ("coefficient_B", "made_at_B", "advantage_B", "prompt_B", "position_B"):
            value = getattr(self, name)
            if tuple(value.shape) != (size,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({size},)")
        if self.rewards_PG.ndim != 2:
            raise ValueError(f"rewards_PG has shape {tuple(self.rewards_PG.shape)}: expected (P, G)")
        for name, most in (("prompt_B", self.rewards_PG.shape[0]), ("position_B", self.rewards_PG.shape[1])):
            value = getattr(self, name)
            if size and (int(value.min()) < 0 or int(value.max()) >= most):
                raise ValueError(f"{name} holds {int(value.min())} to {int(value.max())}: expected 0 to {most - 1}")
        if ((self.coefficient_B != 0) & (self.made_at_B == 0)).any():
            raise ValueError("coefficient_B isn't 0 where made_at_B is: a coefficient is advantage times weight")

    @property
    def known(self) -> torch.Tensor:
        """(B,) whose score is known."""
        return self.coefficient_B != 0

    @property
    def silent(self) -> torch.Tensor:
        """(B,) of no token that counts (masked for its length, say): nothing under any normalisation."""
        return ~self.known & (self.advantage_B != 0)


@dataclass(frozen=True)
class Candidate:
    """A normalisation to compare with.

    ``advantages(rewards_PG, context)`` gives (P, G). ``of_batch``: one group's advantages depend on the other groups.
    """

    name: str
    advantages: Normalise
    of_batch: bool


def candidates(methods: Sequence[str | Callable[..., torch.Tensor]], **options: Any) -> list[Candidate]:
    """Makes a ``Candidate`` of each name in ``METHODS`` and each function that ``normalize_rewards`` takes.

    ``options``: ``eps``, ``alpha``. Raises ``ValueError`` for others, as ``check_normalization``.
    """
    made = []
    for method in methods:
        own = {name: options[name] for name in ("eps",) if name in options and not callable(method)}
        if method == "power":
            own["alpha"] = options.get("alpha", ALPHA)
        check_normalization(method, **own)

        def advantages(rewards_PG, context, method=method, own=own):
            return normalize_rewards(rewards_PG, method, context=context, **own)

        name = method if isinstance(method, str) else function_name(method)
        made.append(Candidate(name, advantages, of_batch=callable(method) or METHODS[method].kind != "group"))
    return made


@dataclass(frozen=True)
class Row:
    """One normalisation's step against the step that was trained; the module's docstring has the equations.

    ``task_share_T``: each task's share of the step.
    """

    cos: float
    factor: float
    share_P: torch.Tensor
    task_share_T: torch.Tensor


@dataclass(frozen=True)
class WhatIf:
    """``rows`` by name; ``absent``: why a normalisation isn't among them. ``mutual_MM``: cosines of the rows' steps
    with one another, ``factor_MM``: |u_row| / |u_column|."""

    rows: dict[str, Row]
    absent: dict[str, str]
    mutual_MM: torch.Tensor
    factor_MM: torch.Tensor


def what_if(
    scores: StepScores,
    methods: Sequence[Candidate],
    *,
    context: Mapping[str, Any] | None = None,
    tasks_TP: torch.Tensor | None = None,
) -> WhatIf:
    """Returns the table of a step, a row for each normalisation whose advantages fall on known scores alone.

    Args:
        scores: of the step that was trained.
        methods: the normalisations to compare with.
        context: as ``normalize_rewards`` takes it, (P, ...) tensors among it.
        tasks_TP: bool, each task's prompts.
    """
    n_prompts = len(scores.rewards_PG)
    if tasks_TP is not None and (tasks_TP.ndim != 2 or tasks_TP.shape[1] != n_prompts):
        raise ValueError(f"tasks_TP has shape {tuple(tasks_TP.shape)}: expected (T, {n_prompts})")
    products, now_B = as_products(scores.gram_BB), _factors(scores, scores.advantage_B)
    square_now = _squares(products, now_B[None], products.of_totals(now_B[None]))[0]
    if square_now == 0:
        return WhatIf({}, {one.name: "the step's gradient is 0" for one in methods}, *_empty())
    made, absent = _advantage_factors(scores, methods, context or {})
    factor_MB = torch.stack([now_B, *made.values()])
    inner_MM = products.of_totals(factor_MB)
    squares = _squares(products, factor_MB, inner_MM)[1:]
    tasks_TP = now_B.new_zeros(0, n_prompts) if tasks_TP is None else tasks_TP.to(now_B)
    rows, kept = {}, []
    for place, ((name, factor_B), square) in enumerate(zip(made.items(), squares, strict=True), start=1):
        if square == 0:
            absent[name] = "its gradient is 0"
            continue
        kept.append(place)
        with_now = float(inner_MM[0, place])
        cos = max(-1.0, min(1.0, with_now / (square * square_now) ** 0.5))
        inner_PP = products.of_sums(scores.prompt_B, n_prompts, factor_B, factor_B[None])[0]
        share_P = inner_PP.sum(1) / square
        rows[name] = Row(cos, with_now / square_now, share_P, tasks_TP @ share_P)
    return WhatIf(rows, absent, *_mutual(inner_MM[kept][:, kept]))


def _advantage_factors(
    scores: StepScores, methods: Sequence[Candidate], context: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(B,) f by method with u_m = sum f_i z_i, and why a method has none."""
    made: dict[str, torch.Tensor] = {}
    absent: dict[str, str] = {}
    for one in methods:
        try:
            advantages_PG = one.advantages(scores.rewards_PG, context)
        except ValueError as error:
            absent[one.name] = str(error)
            continue
        advantage_B = advantages_PG[scores.prompt_B, scores.position_B].double()
        unknown = int(((advantage_B != 0) & ~scores.known & ~scores.silent).sum())
        if unknown:
            absent[one.name] = f"{unknown} sequences without a score would have an advantage"
        else:
            made[one.name] = _factors(scores, advantage_B)
    return made, absent


def _factors(scores: StepScores, advantage_B: torch.Tensor) -> torch.Tensor:
    """(..., B) f with u_m = sum f_i z_i."""
    made_at_B = torch.where(scores.known, scores.made_at_B.double(), 1.0)
    return torch.where(scores.known, advantage_B.double() / made_at_B, 0.0)


def _squares(products: InnerProducts, factor_MB: torch.Tensor, inner_MM: torch.Tensor) -> list[float]:
    """|u_m|^2, 0 where it is rounding."""
    square_M, summed_M = inner_MM.diagonal(), factor_MB.square() @ products.squares()
    return torch.where(square_M > VANISHED * summed_M, square_M, 0.0).tolist()


def _mutual(inner_MM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(inner_MM):
        return _empty()
    length_M = inner_MM.diagonal().sqrt()
    return (inner_MM / length_M[:, None] / length_M).clamp(-1, 1), length_M[:, None] / length_M


def _empty() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, 0), torch.empty(0, 0)
