"""Curvature of each prompt's objective, and the constants of the paper's assumptions, from gradients and rewards.

Shapes: B sequences, P prompts, G completions of one prompt.

arXiv 2601.23135. A sequence's score s_i is the gradient of log pi(o_i | q_p), summed over its tokens: u_i / c_i, known
where c_i isn't 0. a_i is its reward less its group's mean here; raw_p = mean of a_i s_i over the prompt's sequences is
the paper's gradient, whatever the normalisation trained with. A sequence whose score isn't known counts in means over
a group where its a_i is 0 to rounding, and is left out otherwise (masked for its length, say).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .step_gradients import CANCELLED, PromptGroups, StepGradients, group_by_prompt

ROUNDING = 1e-6  # of a group's sigma: an a_i below it is 0
LEAST_FOR_CORRELATION = 3  # two points always correlate perfectly


def directional_curvature(step: StepGradients | PromptGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) int64 prompts and (P,) kappa_p = mean_i a_i (s_i . v_i)^2, v_i the direction of raw_p **without** i.

    Signed. With i in it the statistic measures itself: a completion of large a_i pulls the direction to itself. Only
    the prompts where it is defined: scores known, rewards that differ, two sequences.
    """
    groups = group_by_prompt(step)
    if groups.coefficient_B is None:
        return groups.prompt_P[:0], groups.sigma_P[:0]
    kappa_P = _directional_curvature(groups, _scores(groups))
    defined_P = ~kappa_P.isnan()
    return groups.prompt_P[defined_P], kappa_P[defined_P]


def fisher_trace(step: StepGradients | PromptGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) int64 prompts and (P,) F_p = mean_i norm(s_i)^2, of the prompts that have a known score."""
    groups = group_by_prompt(step)
    trace_P = _fisher_trace(groups, _scores(groups))
    defined_P = ~trace_P.isnan()
    return groups.prompt_P[defined_P], trace_P[defined_P]


def curvature_metrics(groups: PromptGroups) -> dict[str, float]:
    """``curvature/`` and ``theory/``, without the score-based where coefficients are unknown. May hold NaN or inf.

    * ``curvature/sigma_mean``: mean over prompts with a scorable completion of the population std of their rewards.
    * ``curvature/fisher_trace_mean``; ``fisher_variance_corr``: Pearson correlation over prompts of F_p and sigma_p^2,
      ``fisher_variance_n`` over how many. Paper, Table 1: 0.342 within an iteration.
    * ``curvature/directional_corr``, ``directional_n``: Pearson correlation of kappa_p and sigma_p.
    * ``theory/m_bound_p95``: 95th percentile over ordered pairs with <raw_p, raw_q> > 0 of the least M of Assumption 4,
      norm(S_p raw_q)^2 / (norm(S_p)^2 <raw_p, raw_q>), S_p the rows s_i, its norm spectral. ``negative_pairs_frac``:
      share of pairs with <raw_p, raw_q> <= 0, for which no M will do. Both see a sketch's error where gradients are
      nearly orthogonal: compare with an exact run before reading much into M.
    * ``theory/r1``, ``theory/r2``: Assumption 5, the largest ratio of two prompts' norm(raw_p), and of their sigma_p,
      among those above 0.
    """
    sigma_P = groups.sigma_P
    metrics = {"curvature/sigma_mean": sigma_P[~sigma_P.isnan()].mean().item()}
    positive_P = sigma_P[sigma_P > 0]
    if len(positive_P) > 1:
        metrics["theory/r2"] = (positive_P.max() / positive_P.min()).item()
    if groups.coefficient_B is None:
        return metrics
    scores = _scores(groups)
    fisher_P, kappa_P = _fisher_trace(groups, scores), _directional_curvature(groups, scores)
    metrics["curvature/fisher_trace_mean"] = fisher_P[~fisher_P.isnan()].mean().item()
    for name, values_P, of_P in (("fisher_variance", fisher_P, sigma_P.square()), ("directional", kappa_P, sigma_P)):
        both_P = ~values_P.isnan() & ~of_P.isnan()
        metrics[f"curvature/{name}_corr"] = _pearson(values_P[both_P], of_P[both_P])
        metrics[f"curvature/{name}_n"] = float(both_P.sum())
    return metrics | _assumptions(groups, scores)


@dataclass(frozen=True)
class _Scores:
    """Scores of the sequences: which are known, 1 / c_i (0 where unknown), their inner products within a prompt."""

    known_B: torch.Tensor
    inverse_B: torch.Tensor
    gram_PGG: torch.Tensor
    centred_PG: torch.Tensor  # a_i, 0 where the score isn't known
    counted_P: torch.Tensor


def _scores(groups: PromptGroups) -> _Scores:
    given = groups.coefficient_B
    coefficient_B = torch.zeros_like(groups.centred_B) if given is None else given
    known_B = coefficient_B != 0
    inverse_B = torch.where(known_B, 1 / torch.where(known_B, coefficient_B, 1.0), 0.0)
    sigma_B = groups.sigma_P[groups.row_B].nan_to_num(0.0)
    counted_B = known_B | (groups.centred_B.abs() <= ROUNDING * sigma_B)

    index_PG, present_PG = groups.index_PG, groups.present_PG
    inverse_PG = torch.where(present_PG, inverse_B[index_PG], 0.0)
    blocks_PGG = groups.products.within(index_PG)
    return _Scores(
        known_B=known_B,
        inverse_B=inverse_B,
        gram_PGG=blocks_PGG * inverse_PG[:, :, None] * inverse_PG[:, None, :],
        centred_PG=torch.where(present_PG & known_B[index_PG], groups.centred_B[index_PG], 0.0),
        counted_P=groups.sum_by_prompt(counted_B.double()),
    )


def _fisher_trace(groups: PromptGroups, scores: _Scores) -> torch.Tensor:
    """(P,) F_p, NaN where no score is known."""
    square_B = groups.products.squares() * scores.inverse_B.square()
    return groups.sum_by_prompt(square_B) / groups.sum_by_prompt(scores.known_B.double())


def _directional_curvature(groups: PromptGroups, scores: _Scores) -> torch.Tensor:
    """(P,) kappa_p, NaN where undefined. A sequence without which raw_p is 0 has no direction, and adds nothing."""
    a_PG = scores.centred_PG
    square_PG = scores.gram_PGG.diagonal(dim1=1, dim2=2)
    # s_i . raw_p and norm(raw_p)^2, times the count, which directions don't need
    along_PG = (scores.gram_PGG @ a_PG[:, :, None])[:, :, 0]
    norm2_P1 = (a_PG * along_PG).sum(1, keepdim=True)
    along_others_PG = along_PG - a_PG * square_PG
    others_norm2_PG = norm2_P1 - 2 * a_PG * along_PG + a_PG.square() * square_PG
    summed_P1 = (a_PG.square() * square_PG).sum(1, keepdim=True)
    has_direction_PG = others_norm2_PG > CANCELLED * summed_P1
    curvature_PG = along_others_PG.square() / torch.where(has_direction_PG, others_norm2_PG, torch.inf)
    kappa_P = (a_PG * curvature_PG).sum(1) / scores.counted_P
    defined_P = ((a_PG != 0) & has_direction_PG).any(1)
    return torch.where(defined_P, kappa_P, torch.nan)


def _assumptions(groups: PromptGroups, scores: _Scores) -> dict[str, float]:
    """Assumptions 4 and 5 on raw gradients."""
    inverse_B, row_B, n_prompts = scores.inverse_B, groups.row_B, len(groups.prompt_P)
    weight_B = groups.centred_B * inverse_B / scores.counted_P[row_B].clamp(min=1)  # raw_p = sum of weight_i u_i
    raw_PP = groups.products.of_sums(row_B, n_prompts, weight_B, weight_B[None])[0]
    score_raw2_PP = groups.products.squared_along(row_B, n_prompts, inverse_B, weight_B)  # norm(S_p raw_q)^2

    summed_P = groups.sum_by_prompt(groups.products.squares() * weight_B.square())
    chosen_P = raw_PP.diagonal() > CANCELLED * summed_P
    n_chosen = int(chosen_P.sum())
    if n_chosen < 2:
        return {}
    raw_PP, score_raw2_PP = (matrix[chosen_P][:, chosen_P] for matrix in (raw_PP, score_raw2_PP))
    spectral2_P = torch.linalg.eigvalsh(scores.gram_PGG[chosen_P].cpu())[:, -1].to(raw_PP)  # less memory there
    norm_P = raw_PP.diagonal().sqrt()
    different_PP = ~torch.eye(n_chosen, dtype=torch.bool, device=raw_PP.device)
    positive_PP = different_PP & (raw_PP > 0)
    metrics = {
        "theory/negative_pairs_frac": 1 - positive_PP.sum().item() / (n_chosen * (n_chosen - 1)),
        "theory/r1": (norm_P.max() / norm_P.min()).item(),
    }
    if positive_PP.any():
        bound_N = (score_raw2_PP / spectral2_P[:, None] / raw_PP)[positive_PP]
        metrics["theory/m_bound_p95"] = _quantile(bound_N, 0.95)
    return metrics


def _quantile(values_N: torch.Tensor, q: float) -> float:
    """Linear between neighbours, as ``torch.quantile``, which refuses more than 16 million values."""
    place = q * (len(values_N) - 1)
    ordered_N = values_N.sort().values
    low, high = ordered_N[int(place)].item(), ordered_N[min(int(place) + 1, len(values_N) - 1)].item()
    return low + (place - int(place)) * (high - low)


def _pearson(x_P: torch.Tensor, y_P: torch.Tensor) -> float:
    """NaN for fewer than three points, or where either is constant to rounding."""
    if len(x_P) < LEAST_FOR_CORRELATION:
        return float("nan")
    x_P, y_P = ((v / v.abs().max().clamp(min=1e-300)) for v in (x_P, y_P))
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    norms = [v.norm().item() for v in (x_P, y_P)]
    if min(norms) <= 1e-9 * len(x_P) ** 0.5:
        return float("nan")
    return (x_P @ y_P).item() / (norms[0] * norms[1])
