"""Compares the trained step with the steps that other normalisations would have taken.

Shapes: B sequences, P prompts, G completions of one prompt, M normalisations, T tasks.

On policy, a sequence contributes u_i = c_i s_i to the loss's gradient. Its coefficient is c_i = -A_i w_i with advantage
A_i and token weight w_i, and its score is s_i = grad log pi(o_i | q_p). Another normalisation m only changes A_i, so
u_m,i = (A_m,i / A_i) u_i. With u_m = sum_i u_m,i, everything below follows from the inner products of the u_i:

* cos_m = <u_m, u> / (|u_m| |u|): whether m's step has the same direction.
* factor_m = <u_m, u> / |u|^2: the length of m's step along the trained one. A factor that is constant over steps acts
  like another learning rate; one that changes acts like a schedule.
* share_P = <u_m,p, u_m> / |u_m|^2: each prompt's share of m's step. The shares sum to 1; a share below 0 means that the
  step goes against the prompt. A task's share is the sum over its prompts.
* progress_m = -sum over p != q of <u_m,p, g_q>, with g_q the gradient of prompt q's mean reward: what m's step gains on
  other prompts than its own, to first order. A step scored on its own prompts would be praised for its rollout noise.
  If the curvature is the same in all directions, m's best learning rate is proportional to sum over steps of progress_m
  over sum over steps of |u_m|^2 (``report/what_if_table.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.normalize.methods import METHODS, SHARED_OPTIONS, canonical, check_normalization, function_name
from grpo_kernels.normalize.rewards import normalize_rewards

from .inner_products import InnerProducts, as_products

VANISHED = 1e-7  # a squared norm below this share of the summed squared norms is rounding only
ALPHA = 0.5  # default of the method power
ROUNDING = 1e-6  # a centred reward below this share of its group's spread counts as 0

Normalize = Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]  # (rewards_PG, context) -> advantages_PG


@dataclass(frozen=True)
class StepScores:
    """A step's per-sequence gradients, and the rewards from which any normalisation's advantages can be computed.

    Attributes:
        gram_BB: (B, B) inner products of z_i = c_i s_i, as in ``StepGradients``.
        coefficient_B: (B,) c_i, 0 if the score is unknown.
        score_advantage_B: (B,) the advantage that c_i contains, so that c_i / -score_advantage_i is the token weight.
            It is ``advantage_B``, except for a sequence that the extra pass scored, whose trained advantage is 0.
        advantage_B: (B,) the advantages of the trained step.
        prompt_B, position_B: (B,) int64, each sequence's row and column in ``rewards_PG``.
        rewards_PG: (P, G) the rewards of whole groups, NaN where unscorable. The step may lack some of them.
    """

    gram_BB: torch.Tensor | InnerProducts
    coefficient_B: torch.Tensor
    score_advantage_B: torch.Tensor
    advantage_B: torch.Tensor
    prompt_B: torch.Tensor
    position_B: torch.Tensor
    rewards_PG: torch.Tensor

    @property
    def known(self) -> torch.Tensor:
        """(B,) bool, whether the score is known."""
        return self.coefficient_B != 0

    @property
    def masked(self) -> torch.Tensor:
        """(B,) bool: the loss counts no token of the sequence (masked for its length, for example)."""
        return ~self.known & (self.advantage_B != 0)


def raw_gradient_factors(scores: StepScores) -> tuple[torch.Tensor, str | None]:
    """Returns (B,) gamma with g_q = sum over q's sequences of gamma_j z_j, and why g_q is unknown, or None.

    gamma_j = (r_j - mean) / (c_j (n - 1)) with n scorable rewards in the group; 0 in groups of equal rewards.
    """
    rewards_PG = scores.rewards_PG.double()
    count_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
    centred_PG = (rewards_PG - rewards_PG.nanmean(1, keepdim=True)).nan_to_num(0.0)
    spread_P1 = centred_PG.abs().amax(1, keepdim=True)
    centred_PG = torch.where(centred_PG.abs() > ROUNDING * spread_P1, centred_PG, 0.0)
    equal_P1 = rewards_PG.nan_to_num(-torch.inf).amax(1, keepdim=True) == rewards_PG.nan_to_num(torch.inf).amin(
        1, keepdim=True
    )
    centred_PG = torch.where(equal_P1 | (count_P1 < 2), 0.0, centred_PG / (count_P1 - 1).clamp(min=1))
    a_B = centred_PG[scores.prompt_B, scores.position_B]
    known_B = scores.known
    unknown = int(((a_B != 0) & ~known_B & ~scores.masked).sum())
    here_P = scores.prompt_B.bincount(minlength=len(rewards_PG))
    if unknown:
        reason = f"{unknown} sequences without a score have a reward that differs from their group's mean"
    elif (here_P < rewards_PG.shape[1]).any():
        reason = "the step holds parts of groups"
    else:
        reason = None
    coefficient_B = torch.where(known_B, scores.coefficient_B.double(), 1.0)
    return torch.where(known_B, a_B.to(coefficient_B) / coefficient_B, 0.0), reason


@dataclass(frozen=True)
class Candidate:
    """A normalisation to compare with.

    Attributes:
        advantages: returns (P, G) advantages for ``(rewards_PG, context)``.
        needs_batch: whether a group's advantages depend on other groups.
    """

    name: str
    advantages: Normalize
    needs_batch: bool


def candidates(methods: Sequence[str | Callable[..., torch.Tensor]], **options: Any) -> list[Candidate]:
    """Returns a ``Candidate`` for each method: a name in ``METHODS``, or a function for ``normalize_rewards``.

    Of ``options`` each method gets those that it takes. Raises ``ValueError`` like ``check_normalization``.
    """
    found = []
    for method in map(canonical, methods):
        takes = () if callable(method) or method not in METHODS else ("eps", *METHODS[method].options, *SHARED_OPTIONS)
        own = {name: options[name] for name in takes if name in options}
        if method == "power":
            own.setdefault("alpha", ALPHA)
        check_normalization(method, **own)

        def advantages(rewards_PG, context, method=method, own=own):
            return normalize_rewards(rewards_PG, method, context=context, **own)

        name = method if isinstance(method, str) else function_name(method)
        needs_batch = callable(method) or METHODS[method].kind != "group" or "keep_variance" in own
        found.append(Candidate(name, advantages, needs_batch))
    return found


@dataclass(frozen=True)
class Row:
    """One normalisation's step compared with the trained step; the module's docstring has the equations.

    ``progress`` is NaN if raw gradients are unknown.
    """

    cos: float
    factor: float
    square: float
    progress: float
    share_P: torch.Tensor
    task_share_T: torch.Tensor


@dataclass(frozen=True)
class WhatIf:
    """The comparison of a step with several normalisations.

    Attributes:
        rows: by name of the normalisation.
        absent: by name, why a normalisation has no row.
        mutual_MM: (M, M) cosines of the rows' steps with each other.
        factor_MM: (M, M) |u_row| / |u_column|.
    """

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
    """Compares a step with each normalisation that gives an advantage only to sequences whose score is known.

    Args:
        scores: the trained step.
        methods: the normalisations to compare with.
        context: the ``context`` of ``normalize_rewards``.
        tasks_TP: (T, P) bool, each task's prompts; None: no tasks.
    """
    n_prompts = len(scores.rewards_PG)
    products, now_B = as_products(scores.gram_BB), _factors(scores, scores.advantage_B)
    square_now = _squares(products, now_B[None], products.of_totals(now_B[None]))[0]
    if square_now == 0:
        return WhatIf({}, {one.name: "the step's gradient is 0" for one in methods}, *_empty())
    factors, absent = _advantage_factors(scores, methods, context or {})
    factor_MB = torch.stack([now_B, *factors.values()])
    inner_MM = products.of_totals(factor_MB)
    squares = _squares(products, factor_MB, inner_MM)[1:]
    gamma_B, unknown = raw_gradient_factors(scores)
    tasks_TP = now_B.new_zeros(0, n_prompts) if tasks_TP is None else tasks_TP.to(now_B)
    rows, kept = {}, []
    for place, ((name, factor_B), square) in enumerate(zip(factors.items(), squares, strict=True), start=1):
        if square == 0:
            absent[name] = "its gradient is 0"
            continue
        kept.append(place)
        with_now = float(inner_MM[0, place])
        cos = max(-1.0, min(1.0, with_now / (square * square_now) ** 0.5))
        both_B = torch.stack([factor_B, gamma_B.to(factor_B)])
        inner_PP, raw_PP = products.of_sums(scores.prompt_B, n_prompts, factor_B, both_B)
        share_P = inner_PP.sum(1) / square
        progress = math.nan if unknown else float(raw_PP.diagonal().sum() - raw_PP.sum())
        rows[name] = Row(cos, with_now / square_now, square, progress, share_P, tasks_TP @ share_P)
    return WhatIf(rows, absent, *_mutual(inner_MM[kept][:, kept]))


def _advantage_factors(
    scores: StepScores, methods: Sequence[Candidate], context: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns by method the factors f (B,) with u_m = sum f_i z_i, and the reason if a method has none."""
    factors: dict[str, torch.Tensor] = {}
    absent: dict[str, str] = {}
    for one in methods:
        try:
            advantages_PG = one.advantages(scores.rewards_PG, context)
        except ValueError as error:
            absent[one.name] = str(error)
            continue
        advantage_B = advantages_PG[scores.prompt_B, scores.position_B].double()
        unknown = int(((advantage_B != 0) & ~scores.known & ~scores.masked).sum())
        if unknown:
            absent[one.name] = f"{unknown} sequences without a score would have an advantage"
        else:
            factors[one.name] = _factors(scores, advantage_B)
    return factors, absent


def _factors(scores: StepScores, advantage_B: torch.Tensor) -> torch.Tensor:
    """Returns the factors f (B,) with u_m = sum f_i z_i for these advantages."""
    divisor_B = torch.where(scores.known, scores.score_advantage_B.double(), 1.0)
    return torch.where(scores.known, advantage_B.double() / divisor_B, 0.0)


def _squares(products: InnerProducts, factor_MB: torch.Tensor, inner_MM: torch.Tensor) -> list[float]:
    """Returns |u_m|^2 of each row of factors; 0 if it is rounding only."""
    square_M, summed_M = inner_MM.diagonal(), factor_MB.square() @ products.squares()
    return torch.where(square_M > VANISHED * summed_M, square_M, 0.0).tolist()


def _mutual(inner_MM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and ratios of norms of the steps with these inner products."""
    if not len(inner_MM):
        return _empty()
    length_M = inner_MM.diagonal().sqrt()
    return (inner_MM / length_M[:, None] / length_M).clamp(-1, 1), length_M[:, None] / length_M


def _empty() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, 0), torch.empty(0, 0)
