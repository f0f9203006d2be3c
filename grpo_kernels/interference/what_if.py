"""What every other normalisation would have made of a step that was trained with one, without training anything.

Shapes: B sequences, P prompts, G completions of one prompt, M normalisations.

On policy a sequence contributes u_i = c_i s_i to the gradient of the loss, c_i = -A_i w_i: advantage A_i, weight w_i,
score s_i = grad log pi(o_i | q_p). Another normalisation m changes A_i alone, so u_m,i = (A_m,i / A_i) u_i, and
everything below follows from the inner products of the u_i:

* cos_m = <u_m, u> / (|u_m| |u|), u_m the sum over sequences: how much of m is another direction.
* factor_m = <u_m, u> / |u|^2: the factor on the learning rate that the rest of it is. One that is the same at every
  step is a learning rate, one that moves is a schedule.
* gain_m, per unit of step length, in units of reward: mean over all prompts q of
  -<sum_{p != q} u_m,p, g_q> / |sum_{p != q} u_m,p|, with g_q = (1 / (G - 1)) sum_j (r_j - mean) s_j, an unbiased
  estimate of the gradient of q's mean reward, 0 where all rewards are equal. A step is judged by prompts that it isn't
  made of: judged by its own, it would be praised for their rollout noise. Methods that look at the whole batch are
  computed again without q (where the inner products are a matrix). It estimates the gain of a step of P - 1 prompts.
  Errors: jackknife over prompts, the advantages of the others kept.
* share_P: <u_m,p, u_m> / |u_m|^2, who is heard; sums to 1, below 0 for a prompt that the step goes against.

Where prompts belong to tasks, the same by task: shares summed over its prompts, gains as the mean over q of the task
alone, so that they tell whom a normalisation would let learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.normalize.methods import METHODS, check_normalization, function_name
from grpo_kernels.normalize.rewards import normalize_rewards

from .inner_products import InnerProducts, MatrixProducts, as_products

LEAST_PROMPTS = 3  # live ones, for a gain
ROUNDING = 1e-6  # of a group's spread: a centred reward below it is 0
VANISHED = 1e-7  # a squared length below this share of what was summed is rounding
ALPHA = 0.5  # of power, where none is given
BY_PROMPT = ("lengths", "function_rewards", "curvature_scale", "prompt_keys")  # entries of a context

# (J,) of the judges, and the same with each prompt left out of everything, (J, P)
Gain = tuple[torch.Tensor, torch.Tensor]
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
    """A normalisation: ``advantages(rewards_PG, context)`` gives (P, G). ``of_batch``: a group's depend on others';
    ``one_scale``: by a factor that all groups have in common, which no gain per unit of length sees."""

    name: str
    advantages: Normalise
    of_batch: bool
    one_scale: bool = False


def candidates(methods: Sequence[str | Callable[..., torch.Tensor]], **options: Any) -> list[Candidate]:
    """Of names in ``METHODS`` and functions as ``normalize_rewards`` takes them. ``options``: ``eps``, ``alpha``.
    Raises ``ValueError`` for others, as ``check_normalization``."""
    made = []
    for method in methods:
        own = {name: options[name] for name in ("eps",) if name in options and not callable(method)}
        if method == "power":
            own["alpha"] = options.get("alpha", ALPHA)
        check_normalization(method, **own)

        def advantages(rewards_PG, context, method=method, own=own):
            return normalize_rewards(rewards_PG, method, context=context, **own)

        name = method if isinstance(method, str) else function_name(method)
        of_batch = callable(method) or METHODS[method].kind != "group"
        made.append(Candidate(name, advantages, of_batch, one_scale=method == "batch_std"))
    return made


@dataclass(frozen=True)
class Row:
    """Of one normalisation; the module's docstring says what. ``ahead``: its gain less that of the one in use. None:
    can't be told, ``WhatIf.no_gain`` says why. ``tasks``: of each task ``share``, ``gain``, ``ahead`` and their
    errors."""

    cos: float
    factor: float
    share_P: torch.Tensor
    gain: float | None = None
    gain_error: float | None = None
    ahead: float | None = None
    ahead_error: float | None = None
    tasks: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class WhatIf:
    """``rows`` by name; ``absent``: why a normalisation isn't among them. ``mutual_MM``: cosines of the rows' steps
    with one another, ``factor_MM``: |u_row| / |u_column|. ``no_gain``: why no row has a gain."""

    rows: dict[str, Row]
    absent: dict[str, str]
    mutual_MM: torch.Tensor
    factor_MM: torch.Tensor
    no_gain: str | None = None


def what_if(
    scores: StepScores,
    methods: Sequence[Candidate],
    *,
    used: str | None = None,
    context: Mapping[str, Any] | None = None,
    tasks_TP: torch.Tensor | None = None,
) -> WhatIf:
    """The table of a step. ``used``: the name of the normalisation it was trained with, where it is among ``methods``.
    ``context``: as ``normalize_rewards`` takes it, (P, ...) tensors among it. ``tasks_TP``: bool, each task's prompts.
    """
    context = context or {}
    if tasks_TP is not None and (tasks_TP.ndim != 2 or tasks_TP.shape[1] != len(scores.rewards_PG)):
        raise ValueError(f"tasks_TP has shape {tuple(tasks_TP.shape)}: expected (T, {len(scores.rewards_PG)})")
    gamma_B, no_gain = objective(scores)
    products, row_B, n_prompts = as_products(scores.gram_BB), scores.prompt_B, len(scores.rewards_PG)
    now_B = _factors(scores, scores.advantage_B)
    square_now = _squares(products, now_B[None], products.of_totals(now_B[None]))[0]
    if square_now == 0:
        return WhatIf({}, {one.name: "the step's gradient is 0" for one in methods}, *_empty(), None)
    tasks_TP = now_B.new_zeros(0, n_prompts) if tasks_TP is None else tasks_TP.to(now_B)
    judges_JP = torch.cat([now_B.new_ones(1, n_prompts), tasks_TP])
    n_live = len(scores.prompt_B[now_B != 0].unique())
    if no_gain is None and n_live < LEAST_PROMPTS:
        no_gain = f"{n_live} prompts with a gradient, of {LEAST_PROMPTS} that it takes"

    made: dict[str, torch.Tensor] = {}
    absent: dict[str, str] = {}
    for one in methods:
        try:
            advantages_PG = one.advantages(scores.rewards_PG, context)
        except ValueError as error:
            absent[one.name] = str(error)
            continue
        advantage_B = advantages_PG[scores.prompt_B, scores.position_B].to(now_B)
        unknown = int(((advantage_B != 0) & ~scores.known & ~scores.silent).sum())
        if unknown:
            absent[one.name] = f"{unknown} sequences without a score would have an advantage"
        else:
            made[one.name] = _factors(scores, advantage_B)
    factor_MB = torch.stack([now_B, *made.values()])
    inner_MM = products.of_totals(factor_MB)
    squares = _squares(products, factor_MB, inner_MM)[1:]
    lengths = {name: square for name, square in zip(made, squares, strict=True) if square > 0}
    absent.update({name: "its gradient is 0" for name in made if name not in lengths})

    def told(factor_B: torch.Tensor, one: Candidate | None = None) -> tuple[torch.Tensor, Gain | None]:
        """<u_m,p, u_m> of every prompt, and the gain, where it can be told."""
        if no_gain is not None:
            return products.of_sums(row_B, n_prompts, factor_B, factor_B[None])[0].sum(1), None
        inner_PP, judged_PP = products.of_sums(row_B, n_prompts, factor_B, torch.stack([factor_B, gamma_B]))
        if one is not None and one.of_batch and not one.one_scale and isinstance(scores.gram_BB, torch.Tensor):
            return inner_PP.sum(1), _gain_anew(scores, scores.gram_BB.double(), one, gamma_B, context, judges_JP)
        summed = float(factor_B.square() @ products.squares())
        return inner_PP.sum(1), gain_of_fixed(inner_PP, judged_PP, summed, judges_JP)

    found = {one.name: told(made[one.name], one) for one in methods if one.name in lengths}
    of_now = None if no_gain is not None else (found[used] if used in found else told(now_B))[1]
    rows = {}
    for name, (towards_P, gain) in found.items():
        square, with_now = lengths[name], float(inner_MM[0, 1 + list(made).index(name)])
        cos = max(-1.0, min(1.0, with_now / (square * square_now) ** 0.5))
        share_P = towards_P / square
        by_judge: list[dict[str, float]] = [{} for _ in judges_JP]
        if gain is not None and of_now is not None:
            ahead = gain[0] - of_now[0], gain[1] - of_now[1]
            by_judge = [
                {"gain": a, "gain_error": b, "ahead": c, "ahead_error": d}
                for a, b, c, d in zip(
                    gain[0].tolist(), jackknife(gain[1]), ahead[0].tolist(), jackknife(ahead[1]), strict=True
                )
            ]
        shares = (tasks_TP @ share_P).tolist()
        tasks = tuple({"share": share, **of} for share, of in zip(shares, by_judge[1:], strict=True))
        rows[name] = Row(cos, with_now / square_now, share_P, **by_judge[0], tasks=tasks)
    kept = [1 + place for place, name in enumerate(made) if name in lengths]
    return WhatIf(rows, absent, *_mutual(inner_MM[kept][:, kept]), no_gain)


def objective(scores: StepScores) -> tuple[torch.Tensor, str | None]:
    """(B,) gamma with g_q = sum over q's sequences of gamma_j z_j, and why it isn't known, or None.

    gamma_j = (r_j - mean) / (c_j (n - 1)), n the group's scorable rewards; 0 in all-equal groups."""
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
    unknown = int(((a_B != 0) & ~known_B & ~scores.silent).sum())
    here_P = torch.zeros(len(rewards_PG), dtype=torch.int64, device=rewards_PG.device)
    here_P.index_add_(0, scores.prompt_B, torch.ones_like(scores.prompt_B))
    if unknown:
        reason = f"{unknown} sequences without a score have a reward that differs from their group's mean"
    elif (here_P < rewards_PG.shape[1]).any():
        reason = "the step holds parts of groups"
    else:
        reason = None
    coefficient_B = torch.where(known_B, scores.coefficient_B.double(), 1.0)
    return torch.where(known_B, a_B.to(coefficient_B) / coefficient_B, 0.0), reason


def gain_of_fixed(inner_PP: torch.Tensor, judged_PP: torch.Tensor, summed: float, judges_JP: torch.Tensor) -> Gain:
    """As ``gain_without_each``, where the others' factors don't change when a prompt is left out.

    ``inner_PP``: <u_p, u_q>; ``judged_PP``: <u_p, g_q>; ``summed``: sum of |u_i|^2."""
    along_P = judged_PP.diagonal() - judged_PP.sum(0)
    square_P = inner_PP.sum() - 2 * inner_PP.sum(1) + inner_PP.diagonal()
    summed_P = torch.full_like(along_P, summed)
    along_PR = along_P[:, None] + judged_PP.T
    square_PR = square_P[:, None] + (inner_PP.diagonal() - 2 * inner_PP.sum(0))[None, :] + 2 * inner_PP
    return _mean_gain(along_P, square_P, along_PR, square_PR, summed_P, judges_JP)


def gain_without_each(
    gram_BB: torch.Tensor, factor_PB: torch.Tensor, judged_BP: torch.Tensor, judges_JP: torch.Tensor
) -> Gain:
    """The gain, and the same with each prompt left out of everything.

    ``factor_PB``: row q has the factors of the step without prompt q, 0 at q's own sequences. ``judged_BP``: inner
    products of z_i with g_q. ``judges_JP``: 1 where q is one of the prompts that a gain is the mean over. Sequences in
    order."""
    n_prompts = len(factor_PB)

    def sums(values_PB: torch.Tensor) -> torch.Tensor:
        return values_PB.view(n_prompts, n_prompts, -1).sum(2)

    towards_PB = factor_PB @ gram_BB
    blocks_PGG = gram_BB.view(n_prompts, -1, n_prompts, gram_BB.shape[0] // n_prompts).diagonal(dim1=0, dim2=2)
    factor_QPG = factor_PB.view(n_prompts, n_prompts, -1)
    within_QP = torch.einsum("qpg,ghp,qph->qp", factor_QPG, blocks_PGG, factor_QPG)
    along_QP, square_QP = sums(factor_PB * judged_BP.T), sums(factor_PB * towards_PB)
    along_P, square_P = -along_QP.sum(1), square_QP.sum(1)
    along_PR = along_P[:, None] + along_QP  # without r, too
    square_PR = square_P[:, None] - 2 * square_QP + within_QP
    summed_P = (factor_PB.square() * gram_BB.diagonal()).sum(1)
    return _mean_gain(along_P, square_P, along_PR, square_PR, summed_P, judges_JP)


def _mean_gain(along_P, square_P, along_PR, square_PR, summed_P, judges_JP) -> Gain:
    """Row q is judged by prompt q; column r is without prompt r too."""

    def per_length(along: torch.Tensor, square: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
        there = square > VANISHED * summed
        return torch.where(there, along / torch.where(there, square, 1.0).sqrt(), 0.0)

    n_prompts = len(along_P)
    others_PR = 1 - torch.eye(n_prompts, dtype=along_P.dtype, device=along_P.device)
    without_PR = per_length(along_PR, square_PR, summed_P[:, None]) * others_PR
    count_J1 = judges_JP.sum(1, keepdim=True)
    gain_J = judges_JP @ per_length(along_P, square_P, summed_P) / count_J1[:, 0]
    return gain_J, judges_JP @ without_PR / (count_J1 - judges_JP)


def jackknife(without_JR: torch.Tensor) -> list[float]:
    """Standard errors of J values from those with each of R parts left out; NaN where one of them can't be told."""
    n = without_JR.shape[-1]
    departures_JR = without_JR - without_JR.mean(-1, keepdim=True)
    return (departures_JR.square().sum(-1) * (n - 1) / n).sqrt().tolist()


def _factors(scores: StepScores, advantage_B: torch.Tensor) -> torch.Tensor:
    """(..., B) f with u_m = sum f_i z_i."""
    made_at_B = torch.where(scores.known, scores.made_at_B.double(), 1.0)
    return torch.where(scores.known, advantage_B.double() / made_at_B, 0.0)


def _squares(products: InnerProducts, factor_MB: torch.Tensor, inner_MM: torch.Tensor) -> list[float]:
    """|u_m|^2, 0 where it is rounding."""
    square_M, summed_M = inner_MM.diagonal(), factor_MB.square() @ products.squares()
    return torch.where(square_M > VANISHED * summed_M, square_M, 0.0).tolist()


def _gain_anew(
    scores: StepScores,
    gram_BB: torch.Tensor,
    one: Candidate,
    gamma_B: torch.Tensor,
    context: Mapping[str, Any],
    judges_JP: torch.Tensor,
) -> Gain:
    """Of a method of the batch: made again without each prompt."""
    order_B = (scores.prompt_B * scores.rewards_PG.shape[1] + scores.position_B).argsort()
    gram_BB = gram_BB[order_B][:, order_B]
    rows, n_prompts = [], len(scores.rewards_PG)
    judged_BP = MatrixProducts(gram_BB).along(scores.prompt_B[order_B], n_prompts, gamma_B[order_B])
    place_P = torch.arange(n_prompts, device=scores.prompt_B.device)
    for q in range(n_prompts):
        kept = place_P != q
        rest = {name: value[kept] if name in BY_PROMPT else value for name, value in context.items()}
        advantages_PG = torch.zeros_like(scores.rewards_PG)
        advantages_PG[kept] = one.advantages(scores.rewards_PG[kept], rest).to(advantages_PG)
        rows.append(advantages_PG[scores.prompt_B, scores.position_B])
    return gain_without_each(gram_BB, _factors(scores, torch.stack(rows))[:, order_B], judged_BP, judges_JP)


def _mutual(inner_MM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(inner_MM):
        return _empty()
    length_M = inner_MM.diagonal().sqrt()
    return (inner_MM / length_M[:, None] / length_M).clamp(-1, 1), length_M[:, None] / length_M


def _empty() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, 0), torch.empty(0, 0)
