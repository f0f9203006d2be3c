"""Estimates the curvature of each prompt's objective, and the constants of the paper's assumptions.

Shapes: B sequences, P prompts, G completions of one prompt.

Source: arXiv 2601.23135. A sequence's score s_i is the gradient of log pi(o_i | q_p), summed over its tokens. It is
u_i / c_i, and unknown if c_i is 0. a_i is the reward minus its group's mean. raw_p, the mean of a_i s_i over the
prompt's sequences, is the paper's gradient for every normalisation. A sequence with an unknown score counts in a
group's mean if its a_i is 0 up to rounding. Otherwise (for example, if its length masks it) it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .step_gradients import CANCELLED, PromptGroups, StepGradients, group_by_prompt

ROUNDING = 1e-6  # an a_i below this share of its group's sigma counts as 0
MIN_POINTS = 3  # two points always correlate perfectly


def directional_curvature(step: StepGradients | PromptGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the signed curvature kappa_p = mean_i a_i <s_i, v_i>^2 along each prompt's gradient.

    v_i is the direction of raw_p without sequence i. With i included the statistic is biased: a completion with a large
    a_i turns the direction towards its own score.

    Returns:
        The prompts' ids (P,) int64 and curvatures (P,), for prompts with known scores, different rewards and at least
        two sequences.
    """
    groups = group_by_prompt(step)
    if groups.coefficient_B is None:
        return groups.prompt_P[:0], groups.sigma_P[:0]
    kappa_P = _directional_curvature(groups, _scores(groups))
    defined_P = ~kappa_P.isnan()
    return groups.prompt_P[defined_P], kappa_P[defined_P]


def fisher_trace(step: StepGradients | PromptGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids (P,) int64 and F_p = mean_i |s_i|^2 (P,) of the prompts that have a known score."""
    groups = group_by_prompt(step)
    trace_P = _fisher_trace(groups, _scores(groups))
    defined_P = ~trace_P.isnan()
    return groups.prompt_P[defined_P], trace_P[defined_P]


def curvature_metrics(groups: PromptGroups) -> dict[str, float]:
    """Returns the metrics under ``curvature/`` and ``theory/``, possibly NaN or inf.

    * ``curvature/sigma_mean``: mean population std of a prompt's rewards, over prompts with a scorable completion.
    * ``curvature/fisher_trace_mean``: mean of F_p.
    * ``curvature/fisher_variance_corr``: Pearson correlation of F_p and sigma_p^2 over ``fisher_variance_n`` prompts.
      The paper's Table 1 has 0.342 within an iteration.
    * ``curvature/directional_corr``: Pearson correlation of kappa_p and sigma_p over ``directional_n`` prompts.
    * ``theory/m_bound_p95``: 95th percentile, over ordered pairs with <raw_p, raw_q> > 0, of the smallest M that
      satisfies Assumption 4: |S_p raw_q|^2 / (|S_p|^2 <raw_p, raw_q>), with the scores s_i as rows of S_p and its
      spectral norm. ``theory/negative_pairs_frac``: share of pairs with <raw_p, raw_q> <= 0, for which no M exists. A
      sketch's error affects both if gradients are nearly orthogonal; compare with an exact run before you interpret M.
    * ``theory/r1``, ``theory/r2`` (Assumption 5): the largest ratio of two prompts' positive |raw_p|, and sigma_p.

    Without coefficients, only ``curvature/sigma_mean`` and ``theory/r2``.
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
    """The sequences' scores.

    Attributes:
        known_B: (B,) bool, whether the score is known.
        inverse_B: (B,) 1 / c_i, 0 if unknown.
        gram_PGG: (P, G, G) inner products of the scores of each prompt.
        centred_PG: (P, G) a_i, 0 if the score is unknown.
        counted_P: (P,) number of sequences in a group's mean.
    """

    known_B: torch.Tensor
    inverse_B: torch.Tensor
    gram_PGG: torch.Tensor
    centred_PG: torch.Tensor
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
    """Returns (P,) F_p, NaN if no score is known."""
    square_B = groups.products.squares() * scores.inverse_B.square()
    return groups.sum_by_prompt(square_B) / groups.sum_by_prompt(scores.known_B.double())


def _directional_curvature(groups: PromptGroups, scores: _Scores) -> torch.Tensor:
    """Returns (P,) kappa_p, NaN if undefined. A sequence i adds nothing if raw_p without i is 0."""
    a_PG = scores.centred_PG
    square_PG = scores.gram_PGG.diagonal(dim1=1, dim2=2)
    # <s_i, raw_p> and |raw_p|^2 times the count, which cancels in directions
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
    """Returns the metrics of Assumptions 4 and 5."""
    inverse_B, row_B, n_prompts = scores.inverse_B, groups.row_B, len(groups.prompt_P)
    weight_B = groups.centred_B * inverse_B / scores.counted_P[row_B].clamp(min=1)  # raw_p = sum weight_i u_i
    raw_PP = groups.products.of_sums(row_B, n_prompts, weight_B, weight_B[None])[0]
    score_raw2_PP = groups.products.squared_along(row_B, n_prompts, inverse_B, weight_B)  # |S_p raw_q|^2

    summed_P = groups.sum_by_prompt(groups.products.squares() * weight_B.square())
    chosen_P = raw_PP.diagonal() > CANCELLED * summed_P
    n_chosen = int(chosen_P.sum())
    if n_chosen < 2:
        return {}
    raw_PP, score_raw2_PP = (matrix[chosen_P][:, chosen_P] for matrix in (raw_PP, score_raw2_PP))
    spectral2_P = torch.linalg.eigvalsh(scores.gram_PGG[chosen_P].cpu())[:, -1].to(
        raw_PP
    )  # on a GPU it needs much memory
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
    """Returns the quantile like ``torch.quantile``, which refuses more than 16 million values."""
    place = q * (len(values_N) - 1)
    ordered_N = values_N.sort().values
    low, high = ordered_N[int(place)].item(), ordered_N[min(int(place) + 1, len(values_N) - 1)].item()
    return low + (place - int(place)) * (high - low)


def _pearson(x_P: torch.Tensor, y_P: torch.Tensor) -> float:
    """Returns Pearson's correlation; NaN for fewer than three points or a constant (up to rounding)."""
    if len(x_P) < MIN_POINTS:
        return float("nan")
    x_P, y_P = ((v / v.abs().max().clamp(min=1e-300)) for v in (x_P, y_P))
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    norms = [v.norm().item() for v in (x_P, y_P)]
    if min(norms) <= 1e-9 * len(x_P) ** 0.5:
        return float("nan")
    return (x_P @ y_P).item() / (norms[0] * norms[1])
