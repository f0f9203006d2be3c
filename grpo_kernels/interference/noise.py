"""Estimates where a step's noise comes from, and which numbers of prompts and answers minimise it.

Shapes: B sequences, P prompts, G completions of one prompt.

The estimates use raw gradients g_p = (1 / (G - 1)) sum_i (r_i - mean) s_i, whose expectation is the gradient of prompt
p's mean reward, for every normalisation. g_p is the mean over pairs of answers of h_ij = (r_i - r_j) (s_i - s_j) / 2, a
U-statistic, so its variance over answers is (Hoeffding 1948, with squared norms for squares)::

    v(G) = (4 zeta_1 + A / (G - 1)) / G,   A = 2 zeta_2 - 4 zeta_1
    zeta_1 = E <h_12, h_13> - |E h|^2,     zeta_2 = E |h_12|^2 - |E h|^2,     |E h|^2 = E <h_12, h_34>

Each E is the mean over all such pairs of pairs of a prompt's answers. Let B be the variance of E g_p over prompts,
counting groups of equal rewards as 0. A step of P' prompts with G' answers has the variance (B + v(G')) / P'. At a
fixed number P' G' of rollouts the minimum is at G* = 1 + sqrt(A / B), because the term 4 zeta_1 doesn't depend on G'.
(The simpler model v = W / (G - 1) assumes zeta_1 = zeta_2 / 4; it was 14 % off in a simulation where this is right.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .inner_products import as_products
from .what_if import StepScores, raw_gradient_factors

DRAWS = 200  # bootstrap samples
INTERVAL = (0.05, 0.95)
MIN_ANSWERS = 4  # two disjoint pairs of answers need four

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (P,) <h_12, h_34>, <h_12, h_13>, |h_12|^2


@dataclass(frozen=True)
class GradientNoise:
    """The noise of a step's gradient, in squared units of the gradient.

    Attributes:
        between: B.
        within: v(G) at the run's G.
        pairs: A.
        advised: G*, limited to [2, P G].
        low, high: its 90 % interval, from a bootstrap over prompts.
    """

    between: float
    within: float
    pairs: float
    advised: float
    low: float
    high: float

    def variance(self, prompts: int, generations: int, at: int) -> float:
        """Predicts the variance of a step of ``prompts`` with ``generations`` answers each; ``at`` is the run's G."""
        four_zeta_1 = at * self.within - self.pairs / (at - 1)
        return (self.between + (four_zeta_1 + self.pairs / (generations - 1)) / generations) / prompts


def gradient_noise(scores: StepScores, seed: int = 0) -> GradientNoise | None:
    """Estimates the noise; None for unknown scores, a single prompt or answer, or parts of groups."""
    gamma_B, obstacle = raw_gradient_factors(scores)
    n_prompts, n_answers = scores.rewards_PG.shape
    if obstacle is not None or n_prompts < 2 or n_answers < 2:
        return None
    gram_PP = as_products(scores.gram_BB).of_sums(scores.prompt_B, n_prompts, gamma_B, gamma_B[None])[0]
    signal_P, one_P, pair_P = answer_pair_moments(scores)
    pairs_P = 2 * (pair_P - signal_P) - 4 * (one_P - signal_P)
    within_P = (4 * (one_P - signal_P) + pairs_P / (n_answers - 1)) / n_answers

    def components(times_NP: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
        """Returns B, v and A of N resampled steps; ``times`` counts each prompt, which forms no pair with itself."""
        inner_N = ((times_NP @ gram_PP) * times_NP).sum(1) - times_NP.square() @ gram_PP.diagonal()
        n_pairs_N = times_NP.sum(1).square() - times_NP.square().sum(1)
        between_N = times_NP @ signal_P / n_prompts - inner_N / n_pairs_N.clamp(min=1)
        within_N, pairs_N = times_NP @ within_P / n_prompts, times_NP @ pairs_P / n_prompts
        return between_N.tolist(), within_N.tolist(), pairs_N.tolist()

    (between,), (within,), (pairs,) = components(torch.ones_like(gram_PP[:1]))
    if not math.isfinite(between + within + pairs) or between == within == 0:
        return None
    generator = torch.Generator("cpu").manual_seed(seed)  # the same draws on every device
    drawn_NP = torch.randint(n_prompts, (DRAWS, n_prompts), generator=generator, device="cpu").to(gram_PP.device)
    times_NP = torch.zeros_like(gram_PP[:1]).repeat(DRAWS, 1)
    times_NP.scatter_add_(1, drawn_NP, torch.ones_like(times_NP))
    most = n_prompts * n_answers
    resampled_between, _, resampled_pairs = components(times_NP)
    advised = [advised_generations(a, b, most) for a, b in zip(resampled_pairs, resampled_between, strict=True)]
    low, high = torch.tensor(advised).quantile(torch.tensor(INTERVAL)).tolist()
    return GradientNoise(between, within, pairs, advised_generations(pairs, between, most), low, high)


def advised_generations(pairs: float, between: float, most: int) -> float:
    """Returns G* = 1 + sqrt(A / B), limited to [2, most]; ``most`` if the prompts don't differ (B <= 0)."""
    if pairs <= 0:
        return 2.0
    return min(max(1 + math.sqrt(pairs / between), 2.0), float(most)) if between > 0 else float(most)


@dataclass(frozen=True)
class _Answers:
    """The answers of each prompt, in the layout of the rewards.

    Attributes:
        present_PG: (P, G) bool, whether the answer is scorable and in the step.
        known_PG: (P, G) bool, whether its score is also known.
        row_PG: (P, G) its sequence, 0 if it isn't in the step.
        gram_PGG: (P, G, G) <z_i, z_j>.
        score_PGG: (P, G, G) <s_i, s_j>, 0 for unknown scores.
        difference_PGG: (P, G, G) r_i - r_j, 0 unless both are present.
    """

    present_PG: torch.Tensor
    known_PG: torch.Tensor
    row_PG: torch.Tensor
    gram_PGG: torch.Tensor
    score_PGG: torch.Tensor
    difference_PGG: torch.Tensor


def _answers(scores: StepScores) -> _Answers:
    rewards_PG = scores.rewards_PG.double()
    place_PG = torch.full(rewards_PG.shape, -1, dtype=torch.int64, device=rewards_PG.device)
    place_PG[scores.prompt_B, scores.position_B] = torch.arange(len(scores.prompt_B), device=rewards_PG.device)
    row_PG = place_PG.clamp(min=0)
    present_PG = ~rewards_PG.isnan() & (place_PG >= 0)
    coefficient_PG = scores.coefficient_B.double()[row_PG]
    known_PG = present_PG & (coefficient_PG != 0)
    inverse_PG = torch.where(known_PG, 1 / torch.where(known_PG, coefficient_PG, 1.0), 0.0)
    gram_PGG = as_products(scores.gram_BB).within(row_PG)
    reward_PG = torch.where(present_PG, rewards_PG, 0.0)
    both_PGG = present_PG[:, :, None] & present_PG[:, None, :]
    return _Answers(
        present_PG=present_PG,
        known_PG=known_PG,
        row_PG=row_PG,
        gram_PGG=gram_PGG,
        score_PGG=gram_PGG * inverse_PG[:, :, None] * inverse_PG[:, None, :],
        difference_PGG=torch.where(both_PGG, reward_PG[:, :, None] - reward_PG[:, None, :], 0.0),
    )


def answer_pair_moments(scores: StepScores) -> Moments:
    """Returns the means (P,) of <h_12, h_34>, <h_12, h_13> and |h_12|^2 over a prompt's pairs of pairs of answers.

    Prompts with fewer than four answers, or with an unknown score in a live group, get ``_one_number_moments``.
    """
    answers = _answers(scores)
    live_PG = answers.present_PG & (answers.difference_PGG.abs().amax(2) > 0).any(1, keepdim=True)
    rough_P = (answers.present_PG.sum(1) < MIN_ANSWERS) | (live_PG & ~answers.known_PG).any(1)
    exact = _exact_moments(answers)
    if not rough_P.any():
        return exact
    pairs = zip(_one_number_moments(scores, answers), exact, strict=True)
    signal_P, one_P, pair_P = (torch.where(rough_P, rough, value) for rough, value in pairs)
    return signal_P, one_P, pair_P


def _exact_moments(answers: _Answers) -> Moments:
    """Computes the moments from e_i = sum_j h_ij, without a list of all pairs of pairs."""
    score_PGG, difference_PGG = answers.score_PGG, answers.difference_PGG
    square_PG = score_PGG.diagonal(dim1=1, dim2=2)
    length_PGG = square_PG[:, :, None] + square_PG[:, None, :] - 2 * score_PGG
    of_pairs_P = (difference_PGG.square() * length_PGG).sum((1, 2)) / 8  # sum over i < j of |h_ij|^2
    sums_PGG = torch.diag_embed(difference_PGG.sum(2)) - difference_PGG  # 2 e_i as factors of the scores
    inner_PGG = sums_PGG @ score_PGG @ sums_PGG.transpose(1, 2) / 4
    with_one_P = inner_PGG.diagonal(dim1=1, dim2=2).sum(1) - 2 * of_pairs_P
    all_P = inner_PGG.sum((1, 2)) / 4
    n_P = answers.present_PG.sum(1).double()
    n_pairs_P, n_one_P = n_P * (n_P - 1) / 2, n_P * (n_P - 1) * (n_P - 2)
    n_disjoint_P = n_pairs_P * (n_P - 2) * (n_P - 3) / 2
    pair_P = of_pairs_P / n_pairs_P.clamp(min=1)
    one_P = with_one_P / n_one_P.clamp(min=1)
    return (all_P - with_one_P - of_pairs_P) / n_disjoint_P.clamp(min=1), one_P, pair_P


def _one_number_moments(scores: StepScores, answers: _Answers) -> Moments:
    """Assumes one variance for all G: |E h|^2 as in ``metrics.signal``, and zeta_1 = zeta_2 / 4."""
    gamma_B, _ = raw_gradient_factors(scores)
    gamma_PG = torch.where(answers.present_PG, gamma_B[answers.row_PG], 0.0)
    raw_PGG = answers.gram_PGG * gamma_PG[:, :, None] * gamma_PG[:, None, :]
    square_P, trace_P = raw_PGG.sum((1, 2)), raw_PGG.diagonal(dim1=1, dim2=2).sum(1)
    n_P = answers.present_PG.sum(1).double()
    others_P = (n_P - 1).clamp(min=1)
    signal_P = n_P / others_P * (square_P - trace_P) / (1 + 1 / others_P**2)
    zeta_2_P = others_P * (square_P - signal_P)
    return signal_P, signal_P + zeta_2_P / 4, signal_P + zeta_2_P
