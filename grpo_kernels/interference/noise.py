"""Where a step's noise comes from, and how many prompts and answers are best for it.

Shapes: B sequences, P prompts, G completions of one prompt.

On raw gradients g_p = (1 / (G - 1)) sum_i (r_i - mean) s_i, whose expectation is the gradient of prompt p's mean
reward, whatever the normalisation trained with. g_p is the mean over pairs of answers of h_ij = (r_i - r_j)
(s_i - s_j) / 2, a U-statistic, so that its variance over answers is (Hoeffding 1948, squared lengths for squares)::

    v(G) = (4 zeta_1 + A / (G - 1)) / G,   A = 2 zeta_2 - 4 zeta_1
    zeta_1 = E <h_12, h_13> - |E h|^2,     zeta_2 = E |h_12|^2 - |E h|^2,     |E h|^2 = E <h_12, h_34>

each E the mean over all such pairs of pairs of a prompt's answers. With B the variance of E g_p over prompts, all-equal
groups as zeros, a step of P' prompts with G' answers has variance (B + v(G')) / P', and with P' G' rollouts in all it
is least at G* = 1 + sqrt(A / B): what the answers add one by one, 4 zeta_1, is the same for every G'. (One number W for
all G', v = W / (G - 1), is zeta_1 = zeta_2 / 4; in a simulation it was 14 % off where this is right.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .inner_products import as_products
from .what_if import StepScores

DRAWS = 200  # of the bootstrap
INTERVAL = (0.05, 0.95)
ROUNDING = 1e-6  # of a group's spread: a centred reward below it is 0
LEAST = 4  # answers to a prompt, for two pairs that have none in common


@dataclass(frozen=True)
class GradientNoise:
    """``between`` B; ``within`` v(G) at the run's G; ``pairs`` A, all in squared units of the gradient. ``advised``
    G*, within [2, P G], and its interval of 90 % by resampling prompts."""

    between: float
    within: float
    pairs: float
    advised: float
    low: float
    high: float

    def variance(self, prompts: int, generations: int, at: int) -> float:
        """Predicted of a step of ``prompts`` with ``generations`` answers each, from ``at``, the run's G."""
        one_by_one = at * self.within - self.pairs / (at - 1)
        return (self.between + (one_by_one + self.pairs / (generations - 1)) / generations) / prompts


def raw_gradient_factors(scores: StepScores) -> tuple[torch.Tensor, str | None]:
    """Returns (B,) gamma with raw g_q = sum over q's sequences of gamma_j z_j, and why it isn't known, or None.

    gamma_j = (r_j - mean) / (c_j (n - 1)), n the group's scorable rewards; 0 in all-equal groups.
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


def gradient_noise(scores: StepScores, seed: int = 0) -> GradientNoise | None:
    """None where it can't be told: scores that aren't known, a single prompt or answer, parts of groups."""
    gamma_B, unknown = raw_gradient_factors(scores)
    n_prompts, n_answers = scores.rewards_PG.shape
    if unknown is not None or n_prompts < 2 or n_answers < 2:
        return None
    gram_PP = as_products(scores.gram_BB).of_sums(scores.prompt_B, n_prompts, gamma_B, gamma_B[None])[0]
    signal_P, one_P, pair_P = _pairs_of_pairs(scores)
    pairs_P = 2 * (pair_P - signal_P) - 4 * (one_P - signal_P)
    within_P = (4 * (one_P - signal_P) + pairs_P / (n_answers - 1)) / n_answers

    def parts(times_NP: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
        """B, v and A where prompt p is there ``times`` times; pairs of one prompt with itself aren't pairs."""
        inner_N = ((times_NP @ gram_PP) * times_NP).sum(1) - times_NP.square() @ gram_PP.diagonal()
        n_pairs_N = times_NP.sum(1).square() - times_NP.square().sum(1)
        between_N = times_NP @ signal_P / n_prompts - inner_N / n_pairs_N.clamp(min=1)
        within_N, pairs_N = times_NP @ within_P / n_prompts, times_NP @ pairs_P / n_prompts
        return between_N.tolist(), within_N.tolist(), pairs_N.tolist()

    (between,), (within,), (pairs,) = parts(torch.ones_like(gram_PP[:1]))
    if not math.isfinite(between + within + pairs) or between == within == 0:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)  # the same draws on every device
    drawn_NP = torch.randint(n_prompts, (DRAWS, n_prompts), generator=generator, device="cpu").to(gram_PP.device)
    times_NP = torch.zeros_like(gram_PP[:1]).repeat(DRAWS, 1)
    times_NP.scatter_add_(1, drawn_NP, torch.ones_like(times_NP))
    most = n_prompts * n_answers
    resampled_between, _, resampled_pairs = parts(times_NP)
    advised = [advised_generations(a, b, most) for a, b in zip(resampled_pairs, resampled_between, strict=True)]
    low, high = torch.tensor(advised).quantile(torch.tensor(INTERVAL)).tolist()
    return GradientNoise(between, within, pairs, advised_generations(pairs, between, most), low, high)


def advised_generations(pairs: float, between: float, most: int) -> float:
    """G* = 1 + sqrt(A / B), within [2, most]; ``most`` where the prompts can't be told apart (B not above 0)."""
    if pairs <= 0:
        return 2.0
    return min(max(1 + math.sqrt(pairs / between), 2.0), float(most)) if between > 0 else float(most)


def _pairs_of_pairs(scores: StepScores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(P,) means over a prompt's pairs of pairs of answers: <h_12, h_34>, <h_12, h_13> and |h_12|^2.

    Below four answers, or where a score of a group's isn't known (a reward that is its mean), one number for all G:
    |E h|^2 by ``metrics.signal``, zeta_1 = zeta_2 / 4. Sums over pairs are made of e_i = sum_j h_ij, so that no list of
    pairs of pairs is needed.
    """
    rewards_PG = scores.rewards_PG.double()
    n_prompts, n_answers = rewards_PG.shape
    scorable_PG = ~rewards_PG.isnan()
    place_PG = torch.full((n_prompts, n_answers), -1, dtype=torch.int64, device=rewards_PG.device)
    place_PG[scores.prompt_B, scores.position_B] = torch.arange(len(scores.prompt_B), device=rewards_PG.device)
    row_PG = place_PG.clamp(min=0)
    there_PG = scorable_PG & (place_PG >= 0)
    coefficient_PG = scores.coefficient_B.double()[row_PG]
    known_PG = there_PG & (coefficient_PG != 0)
    inverse_PG = torch.where(known_PG, 1 / torch.where(known_PG, coefficient_PG, 1.0), 0.0)
    gram_PGG = as_products(scores.gram_BB).within(row_PG)
    score_PGG = gram_PGG * inverse_PG[:, :, None] * inverse_PG[:, None, :]  # <s_i, s_j>

    reward_PG = torch.where(there_PG, rewards_PG, 0.0)
    both_PGG = there_PG[:, :, None] & there_PG[:, None, :]
    apart_PGG = torch.where(both_PGG, reward_PG[:, :, None] - reward_PG[:, None, :], 0.0)
    square_PG = score_PGG.diagonal(dim1=1, dim2=2)
    length_PGG = square_PG[:, :, None] + square_PG[:, None, :] - 2 * score_PGG
    of_pairs_P = (apart_PGG.square() * length_PGG).sum((1, 2)) / 8  # sum over i < j of |h_ij|^2
    sums_PGG = torch.diag_embed(apart_PGG.sum(2)) - apart_PGG  # 2 e_i, in terms of the scores
    inner_PGG = sums_PGG @ score_PGG @ sums_PGG.transpose(1, 2) / 4
    with_one_P = inner_PGG.diagonal(dim1=1, dim2=2).sum(1) - 2 * of_pairs_P
    all_P = inner_PGG.sum((1, 2)) / 4
    n_P = there_PG.sum(1).double()
    n_pairs_P, n_one_P = n_P * (n_P - 1) / 2, n_P * (n_P - 1) * (n_P - 2)
    n_apart_P = n_pairs_P * (n_P - 2) * (n_P - 3) / 2
    pair_P = of_pairs_P / n_pairs_P.clamp(min=1)
    one_P = with_one_P / n_one_P.clamp(min=1)
    signal_P = (all_P - with_one_P - of_pairs_P) / n_apart_P.clamp(min=1)

    live_PG = there_PG & (apart_PGG.abs().amax(2) > 0).any(1, keepdim=True)
    rough_P = (n_P < LEAST) | (live_PG & ~known_PG).any(1)
    if rough_P.any():
        gamma_B, _ = raw_gradient_factors(scores)
        gamma_PG = torch.where(there_PG, gamma_B[row_PG], 0.0)
        raw_PGG = gram_PGG * gamma_PG[:, :, None] * gamma_PG[:, None, :]
        whole_P, trace_P = raw_PGG.sum((1, 2)), raw_PGG.diagonal(dim1=1, dim2=2).sum(1)
        more_P = (n_P - 1).clamp(min=1)
        rough_signal_P = n_P / more_P * (whole_P - trace_P) / (1 + 1 / more_P**2)
        variance_P = more_P * (whole_P - rough_signal_P)  # zeta_2
        signal_P = torch.where(rough_P, rough_signal_P, signal_P)
        one_P = torch.where(rough_P, rough_signal_P + variance_P / 4, one_P)
        pair_P = torch.where(rough_P, rough_signal_P + variance_P, pair_P)
    return signal_P, one_P, pair_P
