"""A log-linear policy over few answers, trained by exact or sampled gradients: the theory's own ground.

P prompts with K answers each, the first of which is right. Of prompt p, pi_p = softmax(base_p + features_p theta), and
a prompt's part of the objective is its expected reward J_p. Arrays are float64: S seeds, R learning rates (all trained
at once), P prompts, K answers; D are the features of one prompt.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch

from grpo_kernels import normalize_rewards

EPS = 1e-4  # of normalize_rewards


@dataclasses.dataclass(frozen=True)
class Setting:
    """One place on the map.

    Attributes:
        overlap: share, in [0, 1], of a feature's squared length that lies in directions common to all prompts; two
            prompts' gradients then have cosines about 0, of standard deviation about overlap / sqrt(shared_features).
        spread: standard deviation of the prompts' difficulties, in logits of the pass rate.
        pass_rate: of the median prompt, before training.
        group: answers sampled to a prompt at each step; 0: exact gradients.
        noise: share of rewards that are flipped, below 1/2.
        prompts, answers, features, shared_features: P, K, D, and the number of common directions; features = 0 gives
            each answer a direction of its own (a table of logits).
    """

    overlap: float = 0.0
    spread: float = 0.0
    pass_rate: float = 0.1
    group: int = 8
    noise: float = 0.0
    prompts: int = 64
    answers: int = 8
    features: int = 3
    shared_features: int = 32


class Policies:
    """The policies of a setting, one for each seed: random unit features, difficulties at the quantiles of a normal."""

    def __init__(self, setting: Setting, seeds: list[int]) -> None:
        self.setting, self.seeds = setting, seeds
        drawn = [self._draw(seed) for seed in seeds]
        self.own_SPKD, self.shared_SPKD, self.base_SPK = (np.stack(parts) for parts in zip(*drawn, strict=True))

    def _draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        setting, random = self.setting, np.random.default_rng(seed)
        prompts, answers = setting.prompts, setting.answers
        own = _unit(random.standard_normal((prompts, answers, setting.features or answers)))
        if not setting.features:
            own = np.broadcast_to(np.eye(answers), own.shape)
        shared = _unit(random.standard_normal((prompts, answers, setting.shared_features)))
        difficulty = np.array([NormalDist().inv_cdf((i + 0.5) / prompts) for i in range(prompts)])
        right = np.log(setting.pass_rate / (1 - setting.pass_rate)) + setting.spread * random.permutation(difficulty)
        base = np.zeros((prompts, answers))
        base[:, 0] = right + np.log(answers - 1)
        return np.sqrt(1 - setting.overlap) * own, np.sqrt(setting.overlap) * shared, base

    @cached_property
    def shared_rows(self) -> np.ndarray:
        """``(S, P K, D)``."""
        return self.shared_SPKD.reshape(len(self.seeds), -1, self.shared_SPKD.shape[-1])

    def probabilities(self, own_SRPD: np.ndarray, shared_SRD: np.ndarray) -> np.ndarray:
        """``(S, R, P, K)``, from each prompt's own parameters and the common ones."""
        logits = np.einsum("spkd,srpd->srpk", self.own_SPKD, own_SRPD, optimize=True)
        logits += (shared_SRD @ self.shared_rows.swapaxes(1, 2)).reshape(logits.shape)
        logits += self.base_SPK[:, None]
        logits -= logits.max(-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(-1, keepdims=True)
        return logits

    def parameters(self, logits_SRPK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A gradient with respect to the logits as one to the parameters: own ``(S, R, P, D)``, and shared, with
        prompts summed, ``(S, R, D)``."""
        own = np.einsum("spkd,srpk->srpd", self.own_SPKD, logits_SRPK, optimize=True)
        shared = logits_SRPK.reshape(*logits_SRPK.shape[:2], -1) @ self.shared_rows
        return own, shared

    def logits_along(self, own_SPD: np.ndarray, shared_SPD: np.ndarray) -> np.ndarray:
        """How each prompt's logits move along a direction of its own, ``(S, P, K)``."""
        own = np.einsum("spkd,spd->spk", self.own_SPKD, own_SPD)
        return own + np.einsum("spkd,spd->spk", self.shared_SPKD, shared_SPD)

    def pass_rates(self, pi_SRPK: np.ndarray) -> np.ndarray:
        """Expected reward of each prompt, with the flips: (S, R, P)."""
        return self.setting.noise + (1 - 2 * self.setting.noise) * pi_SRPK[..., 0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# The gradient of one step, with respect to the logits

OPTIONS = {"power": {"alpha": 0.5}}


def exact_gradient(method: str, pi_SRPK: np.ndarray, noise: float) -> np.ndarray:
    """sum_a pi_a E[r - m | a] (e_a - pi) of each prompt, over sigma with ``std``, with endlessly many answers.

    With binary rewards it is (1 - 2 noise) pi_right (e_right - pi): the paper's gradient, for ``mean``.
    """
    m = noise + (1 - 2 * noise) * pi_SRPK[..., :1]
    gradient = -pi_SRPK * pi_SRPK[..., :1]
    gradient[..., 0] += pi_SRPK[..., 0]
    scale = {"mean": 1.0, "std": 1 / (np.sqrt(m * (1 - m)) + EPS)}[method]
    return (1 - 2 * noise) * scale * gradient


def advantage_table(method: str, group: int) -> np.ndarray:
    """``(G + 1, 2)``: the advantage of a wrong and of a right answer in a group with 0 to G right ones.

    (What the first row says of right answers and the last of wrong ones is never used.)
    """
    rewards_PG = torch.ones(group + 1, group, dtype=torch.float64).tril(-1)
    advantages_PG = normalize_rewards(rewards_PG, method, eps=EPS, **OPTIONS.get(method, {})).double()
    return torch.stack([advantages_PG[:, -1], advantages_PG[:, 0]], 1).numpy()


def sampled_gradient(
    table: np.ndarray, pi_SRPK: np.ndarray, group: int, noise: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(1/G) sum_i A_i (e_i - pi) of G sampled answers, and how many of each group were rewarded, ``(S, R, P)``.

    With binary rewards an answer's advantage depends on its own reward and on how many were rewarded alone: so the
    answers are drawn as counts.
    """
    drawn = random.multinomial(group, pi_SRPK)
    rewarded = np.where(np.arange(drawn.shape[-1]) == 0, drawn, 0)
    if noise:
        rewarded = random.binomial(drawn, np.where(np.arange(drawn.shape[-1]) == 0, 1 - noise, noise))
    right = rewarded.sum(-1)
    wrong_advantage, right_advantage = np.moveaxis(table[right], -1, 0)[..., None]
    weights = (right_advantage * rewarded + wrong_advantage * (drawn - rewarded)) / group
    return weights - weights.sum(-1, keepdims=True) * pi_SRPK, right


class Sampled:
    """Samples a method's gradient at each step.

    The methods are ``normalize_rewards``'s that need one group alone, and ``true_sigma``: the advantages of ``mean``
    divided by the true sigma, which only a simulation knows.
    """

    def __init__(self, method: str, setting: Setting, random: np.random.Generator) -> None:
        self.method, self.setting, self.random = method, setting, random
        self.table = advantage_table("mean" if method == "true_sigma" else method, setting.group)

    def __call__(self, pi_SRPK: np.ndarray, sigma_SRP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradient, and how many of each group were rewarded, ``(S, R, P)``."""
        gradient, right = sampled_gradient(self.table, pi_SRPK, self.setting.group, self.setting.noise, self.random)
        if self.method == "true_sigma":
            gradient /= sigma_SRP[..., None] + EPS
        return gradient, right


# Training


@dataclasses.dataclass
class Runs:
    """Every seed at every rate, ``(steps + 1, S, R)``.

    ``sigma`` and ``group_sigma``, for C, are means over prompts, exact and of the sampled groups, ``variation`` is the
    coefficient of variation of sigma over prompts, ``dead`` the share of groups whose rewards are all equal (0 with
    exact gradients).
    """

    accuracy: np.ndarray
    sigma: np.ndarray
    group_sigma: np.ndarray
    variation: np.ndarray
    dead: np.ndarray


def train(
    policies: Policies,
    method: str,
    rates: np.ndarray,
    steps: int,
    at_step: Callable[[int, np.ndarray], None] = lambda step, pi_SRPK: None,
) -> Runs:
    """Plain gradient ascent, theta += rate * sum over prompts of the method's gradient.

    Args:
        rates: ``(S, R)``, the rates of each seed.
        at_step: called with each step and the policies ``(S, R, P, K)`` before it.
    """
    setting, seeds = policies.setting, len(policies.seeds)
    random = np.random.default_rng([*policies.seeds, *method.encode()])
    sampled = Sampled(method, setting, random) if setting.group else None
    own = np.zeros((seeds, rates.shape[1], setting.prompts, policies.own_SPKD.shape[-1]))
    shared = np.zeros((seeds, rates.shape[1], setting.shared_features))
    rows = []
    for step in range(steps + 1):
        pi = policies.probabilities(own, shared)
        at_step(step, pi)
        m = policies.pass_rates(pi)
        sigma = np.sqrt(m * (1 - m))
        if sampled is None:
            gradient, group_sigma, dead = exact_gradient(method, pi, setting.noise), sigma, np.zeros_like(m)
        else:
            gradient, right = sampled(pi, sigma)
            share = right / setting.group
            group_sigma, dead = np.sqrt(share * (1 - share)), (right == 0) | (right == setting.group)
        mean = sigma.mean(-1)
        rows.append(
            (pi[..., 0].mean(-1), mean, group_sigma.mean(-1), sigma.std(-1) / np.maximum(mean, 1e-12), dead.mean(-1))
        )
        own_step, shared_step = policies.parameters(gradient)
        own += rates[:, :, None, None] * own_step
        shared += rates[:, :, None] * shared_step
    return Runs(*(np.stack(column) for column in zip(*rows, strict=True)))


def steps_to(accuracy: np.ndarray, target: float) -> np.ndarray:
    """Steps, interpolated, until ``accuracy (steps + 1, ...)`` first reaches ``target``; inf where it doesn't."""
    reached = accuracy >= target
    first = reached.argmax(0)
    at = np.take_along_axis(accuracy, first[None], 0)[0]
    before = np.take_along_axis(accuracy, np.maximum(first - 1, 0)[None], 0)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.where(first > 0, first - 1 + (target - before) / (at - before), 0.0)
    return np.where(reached.any(0), steps, np.inf)


# What the theory assumes, at one state


def assumptions(policies: Policies, pi_SPK: np.ndarray) -> dict[str, np.ndarray]:
    """What Theorem 3.2 assumes of exact gradients, a number for each seed, ``(S,)``.

    raw_p is ``mean``'s gradient, S_p the rows sqrt(pi_a) (phi_a - sum_b pi_b phi_b). Assumption 4 wants
    norm(S_p raw_q)^2 <= M norm(S_p)^2 <raw_p, raw_q> for every pair: no M will do where the inner product is negative,
    or 0 with S_p raw_q not 0.
    """
    raw = exact_gradient("mean", pi_SPK[:, None], policies.setting.noise)
    own, _ = policies.parameters(raw)
    shared_SPD = np.einsum("spkd,spk->spd", policies.shared_SPKD, raw[:, 0])
    squared = (own[:, 0] ** 2).sum(-1) + (shared_SPD**2).sum(-1)  # norm(raw_p)^2
    inner = shared_SPD @ shared_SPD.swapaxes(1, 2)  # of two prompts: their own directions have nothing in common
    pairs = ~np.eye(inner.shape[-1], dtype=bool)
    norms = np.sqrt(squared)
    norms = np.where(norms > 1e-9, norms, np.nan)  # a prompt that is wholly solved, or lost, has no direction
    cosines = (inner / (norms[:, :, None] * norms[:, None, :]))[:, pairs]

    weights = np.sqrt(pi_SPK)[..., None]
    scores_own = weights * _centred(policies.own_SPKD, pi_SPK)
    scores_shared = weights * _centred(policies.shared_SPKD, pi_SPK)
    gram = scores_own @ scores_own.swapaxes(2, 3) + scores_shared @ scores_shared.swapaxes(2, 3)
    spectral = np.linalg.eigvalsh(gram)[..., -1]  # norm(S_p)^2
    moved = (np.einsum("spkd,sqd->spqk", scores_shared, shared_SPD) ** 2).sum(-1)  # norm(S_p raw_q)^2
    positive = pairs & (inner > 0) & ~np.isnan(norms[:, :, None] * norms[:, None, :])
    bound = np.divide(moved, spectral[:, :, None] * inner, out=np.full_like(inner, np.nan), where=positive)

    direction = policies.logits_along(own[:, 0] / norms[..., None], shared_SPD / norms[..., None])
    curvature = curvature_along(pi_SPK, direction, policies.setting.noise)
    m = policies.pass_rates(pi_SPK[:, None])[:, 0]
    sigma = np.where(np.isnan(norms), np.nan, np.sqrt(m * (1 - m)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all prompts solved: nan
        return {
            "live": (~np.isnan(norms)).mean(-1),
            "cos_mean": np.nanmean(cosines, -1),
            "cos_std": np.nanstd(cosines, -1),
            "near_orthogonal_frac": np.nanmean(np.where(np.isnan(cosines), np.nan, np.abs(cosines) < 0.1), -1),
            "negative_frac": (inner < 0)[:, pairs].mean(-1),
            "violated_frac": ((inner < 0) | ((inner == 0) & (moved > 0)))[:, pairs].mean(-1),
            "m_bound_p95": np.nanquantile(bound.reshape(len(bound), -1), 0.95, axis=-1),
            "r1": np.nanmax(norms, -1) / np.nanmin(norms, -1),
            "r2": np.nanmax(sigma, -1) / np.nanmin(sigma, -1),
            "curvature_corr": _correlation(np.abs(curvature), sigma),
            "curvature_negative_frac": np.nanmean(np.where(np.isnan(curvature), np.nan, curvature < 0), -1),
            "curvature_over_sigma": np.nanmax(np.abs(curvature) / sigma, -1),
        }


def curvature_along(pi: np.ndarray, direction: np.ndarray, noise: float) -> np.ndarray:
    """d^2 J_p / dt^2 where the logits ``(..., K)`` move along ``direction`` v:
    (1 - 2 noise) pi_right ((v_right - mean v)^2 - var v)."""
    mean = (pi * direction).sum(-1)
    variance = (pi * (direction - mean[..., None]) ** 2).sum(-1)
    return (1 - 2 * noise) * pi[..., 0] * ((direction[..., 0] - mean) ** 2 - variance)


def _centred(features_SPKD: np.ndarray, pi_SPK: np.ndarray) -> np.ndarray:
    return features_SPKD - np.einsum("spk,spkd->spd", pi_SPK, features_SPKD)[:, :, None]


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, over the last axis, where neither is nan; nan where one is constant."""
    known = ~np.isnan(a) & ~np.isnan(b)
    a, b = np.where(known, a, np.nan), np.where(known, b, np.nan)
    a, b = a - np.nanmean(a, -1, keepdims=True), b - np.nanmean(b, -1, keepdims=True)
    scale = np.sqrt(np.nansum(a**2, -1) * np.nansum(b**2, -1))
    return np.divide(np.nansum(a * b, -1), scale, out=np.full_like(scale, np.nan), where=scale > 1e-12)
