"""How the gradients of a step's prompts interfere: cosines, how much of them is signal, and what they sum to.

Shapes: B sequences, P prompts, H hidden.

Pure functions of ``StepGradients`` (``step_gradients.py``), in float64. ``interference_metrics`` gathers everything
that is logged of a step, with ``curvature.py``; a figure that can't be computed is left out, so that no value
is NaN or infinite.

Cosines are raw: of gradients as trained, rollout noise and all, as in arXiv 2601.23135's Table 3. Rollout noise pulls
them to 0, the more so the fewer completions a prompt has: prompts of one true gradient have a raw cosine of about
``interference/reliability``. Only the sketch's error is taken out, and only where that is exact: of variances.
"""

from __future__ import annotations

import math

import torch

from .curvature import curvature_metrics
from .step_gradients import PromptGroups, StepGradients, group_by_prompt

NEAR_ORTHOGONAL = 0.1  # of absolute cosines, the paper's
CONFLICT_FLOOR = 1e-3  # a cosine nearer to 0 has no sign worth counting, sketch or not: bf16 gradients resolve no more


def interference_metrics(
    step: StepGradients | PromptGroups, *, sketch_rmse: float = 0.0, features_PP: torch.Tensor | None = None
) -> dict[str, float]:
    """All that is logged of one step, under ``interference/``, ``curvature/`` and ``theory/``; finite values only.

    ``sketch_rmse``: error of one cosine (``sketch_error.predicted_rmse``), 0 for exact inner products.
    ``features_PP``: inner products of a feature vector of each prompt, such as the mean of its last hidden states, in
    any order.

    Over pairs of different live prompts, cos = K_pq / sqrt(K_pp K_qq), K_PP the inner products of prompt gradients:

    * ``live_prompts``: how many prompts have a gradient.
    * ``cos_mean``; ``cos_std``, sqrt(sample variance - sketch_rmse^2), left out where that is negative and for a single
      pair; ``cos_abs_mean`` (the sketch's error included: at true cosines of 0 it is 0.8 sketch_rmse).
    * ``near_orthogonal_frac``: abs cos < 0.1. ``conflict_frac``: cos < -tau, tau = max(2 sketch_rmse, 0.001).
    * ``cos_corrected_mean``, ``cos_corrected_std``: K_pq / sqrt(V_p V_q) over pairs where both signals V are positive;
      ``cos_corrected_left_out`` counts the other pairs.
    * ``reliability``: mean V_p / mean K_pp, see ``signal``. Where a prompt has one sequence it isn't counted.
    * ``sum_ratio``: norm(sum of g_p)^2 / sum of norm(g_p)^2. 1: orthogonal, below: they cancel, up to P: aligned.
    * ``effective_rank``: trace(K_PP)^2 / sum of K_pq^2, between 1 and P. The sketch adds sketch_rmse^2 K_pp K_qq to
      each square off the diagonal, which would cap the rank near 1 / sketch_rmse^2: it is subtracted.
    * ``noise_scale``: (trace(K_PP) / P - m) / m, m the mean of K_PP off its diagonal, left out unless m > 0: the number
      of prompts at which signal and noise of a step are equal. P counts dead prompts too, as they cost rollouts.
    * ``feature_cos_abs_mean``: absolute cosine of two prompts' features, paper section 4.1.
    * ``sketch_rmse``, where there is a pair.
    """
    if not math.isfinite(sketch_rmse) or sketch_rmse < 0:
        raise ValueError(f"sketch_rmse={sketch_rmse!r} must be a finite number, not negative")
    groups = group_by_prompt(step)
    metrics = _cosine_metrics(groups, sketch_rmse) | _signal_metrics(groups) | _sum_metrics(groups, sketch_rmse)
    if features_PP is not None:
        if features_PP.ndim != 2 or features_PP.shape[0] != features_PP.shape[1] or not features_PP.isfinite().all():
            raise ValueError(f"features_PP {tuple(features_PP.shape)}: expected finite inner products, (P, P)")
        features_PP = features_PP.double()
        cosine_N = _cosines(features_PP, features_PP.diagonal() > 0)
        metrics["feature_cos_abs_mean"] = _mean(cosine_N.abs())
    named = {f"interference/{name}": value for name, value in metrics.items()} | curvature_metrics(groups)
    return {name: value for name, value in named.items() if math.isfinite(value)}


def orthogonality(step: StepGradients | PromptGroups, sketch_rmse: float = 0.0) -> float | None:
    """How orthogonal the prompts' gradients are, in [0, 1]; None where fewer than two prompts are live.

    min(1, near_orthogonal_frac / erf(0.1 / (sqrt(2) sketch_rmse))): the paper's share of pairs with abs cos < 0.1,
    over the share that a sketch lets pass when none interferes. So it is 1 when no two prompts interfere, whatever
    the sketch, and 0 when every two do. It weighs opposed and aligned pairs alike (``sum_ratio`` lets them cancel),
    doesn't fall with the number of prompts (``effective_rank / P`` does), and uses the range: 0.98, 0.80, 0.52 at the
    paper's three stages, where 1 - mean abs cos would only go from 0.96 to 0.89. Rollout noise moves it towards 1.
    """
    groups = group_by_prompt(step)
    cosine_N = _cosines(groups.gram_PP, groups.live_P)
    if len(cosine_N) == 0:
        return None
    passing = math.erf(NEAR_ORTHOGONAL / (math.sqrt(2) * sketch_rmse)) if sketch_rmse > 0 else 1.0
    return min(1.0, _near_orthogonal_frac(cosine_N) / passing)


def signal(groups: PromptGroups) -> torch.Tensor:
    """(P,) V_p, an estimate of norm(E g_p)^2 without bias, over rollouts; NaN where a prompt has one sequence.

    V_p = n / (n - 1) * (sum of the prompt's block of K - its trace) / (1 + 1 / (b - 1)^2), n its sequences here. The
    first part would do if contributions were independent; a baseline that is a mean of b rewards, among them those
    of both sequences, adds 1 / (b - 1)^2 of it: 1.11 at b = 4, 1.02 at b = 8. Exact for r - mean and r - mean of the
    others; division by the group's own std
    shifts it by a few per cent (2% at pass rate 1/2).
    """
    between_P = groups.gram_PP.diagonal() - groups.trace_P
    factor = 1 + 1 / (groups.baseline_size - 1) ** 2 if groups.baseline_size else 1.0
    n_P = groups.count_P
    return torch.where(n_P > 1, n_P / (n_P - 1).clamp(min=1) * between_P / factor, torch.nan)


def _near_orthogonal_frac(cosine_N: torch.Tensor) -> float:
    return _mean((cosine_N.abs() < NEAR_ORTHOGONAL).double())


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()  # NaN of none: left out at the end


def _std(values: torch.Tensor, error: float = 0.0) -> float:
    """Sample std with an independent error of this std taken out; NaN for one value and where nothing remains."""
    variance = values.var().item() - error**2 if len(values) > 1 else math.nan
    return math.sqrt(variance) if variance >= 0 else math.nan


def _pairs(matrix_PP: torch.Tensor) -> torch.Tensor:
    """The entries above the diagonal."""
    row_N, column_N = torch.triu_indices(len(matrix_PP), len(matrix_PP), offset=1, device=matrix_PP.device)
    return matrix_PP[row_N, column_N]


def _cosines(gram_PP: torch.Tensor, chosen_P: torch.Tensor) -> torch.Tensor:
    """Over the pairs of chosen rows, whose squared norms are positive."""
    gram_PP = gram_PP[chosen_P][:, chosen_P]
    norm_P = gram_PP.diagonal().sqrt()
    return _pairs(gram_PP / norm_P[:, None] / norm_P)


def _cosine_metrics(groups: PromptGroups, sketch_rmse: float) -> dict[str, float]:
    metrics = {"live_prompts": float(groups.live_P.sum())}
    cosine_N = _cosines(groups.gram_PP, groups.live_P)
    if len(cosine_N) == 0:
        return metrics
    return metrics | {
        "cos_mean": _mean(cosine_N),
        "cos_std": _std(cosine_N, sketch_rmse),
        "cos_abs_mean": _mean(cosine_N.abs()),
        "near_orthogonal_frac": _near_orthogonal_frac(cosine_N),
        "conflict_frac": _mean((cosine_N < -max(2 * sketch_rmse, CONFLICT_FLOOR)).double()),
        "sketch_rmse": sketch_rmse,
    }


def _signal_metrics(groups: PromptGroups) -> dict[str, float]:
    signal_P = signal(groups)
    known_P = groups.live_P & ~signal_P.isnan()
    if not known_P.any():
        return {}
    metrics = {"reliability": _mean(signal_P[known_P]) / _mean(groups.gram_PP.diagonal()[known_P])}
    positive_P = known_P & (signal_P > 0)
    root_P = signal_P[positive_P].sqrt()
    cosine_N = _pairs(groups.gram_PP[positive_P][:, positive_P] / root_P[:, None] / root_P)
    n_live = int(groups.live_P.sum())
    if n_live > 1:
        metrics["cos_corrected_left_out"] = n_live * (n_live - 1) / 2 - len(cosine_N)
    return metrics | {"cos_corrected_mean": _mean(cosine_N), "cos_corrected_std": _std(cosine_N)}


def _sum_metrics(groups: PromptGroups, sketch_rmse: float) -> dict[str, float]:
    square_P = groups.gram_PP.diagonal()
    trace, n_prompts = square_P.sum().item(), len(square_P)
    if not groups.live_P.any():
        return {}
    total = groups.gram_PP.sum().item()
    squares_on = square_P.square().sum().item()
    squares_off = groups.gram_PP.square().sum().item() - squares_on
    error_off = sketch_rmse**2 * (trace**2 - squares_on)
    metrics = {
        "sum_ratio": total / trace,
        "effective_rank": trace**2 / (squares_on + max(squares_off - error_off, 0.0)),
    }
    mean_off = (total - trace) / (n_prompts * (n_prompts - 1)) if n_prompts > 1 else 0.0
    if mean_off > 0:
        metrics["noise_scale"] = (trace / n_prompts - mean_off) / mean_off
    return metrics
