"""Computes the interference metrics of a step: cosines of the prompts' gradients, their signal, and their sum.

Shapes: B sequences, P prompts, N pairs of prompts.

These are pure functions of ``StepGradients`` (``step_gradients.py``), in float64. ``interference_metrics`` returns all
metrics of a step, including those of ``curvature.py``. It leaves out a metric that can't be computed, so that no value
is NaN or infinite.

Cosines are raw, as in arXiv 2601.23135's Table 3: they include rollout noise. Rollout noise shrinks them towards 0,
the more the fewer completions a prompt has; ``alignment.py`` removes it, over several steps. The sketch's error is
subtracted only from variances, where that is exact.
"""

from __future__ import annotations

import math

import torch

from .curvature import curvature_metrics
from .step_gradients import PromptGroups, StepGradients, group_by_prompt

NEAR_ORTHOGONAL = 0.1  # the paper's limit for absolute cosines
CONFLICT_FLOOR = 1e-3  # bf16 gradients don't resolve the sign of a cosine closer to 0


def interference_metrics(
    step: StepGradients | PromptGroups, *, sketch_rmse: float = 0.0, features_PP: torch.Tensor | None = None
) -> dict[str, float]:
    """Returns all metrics of one step, under ``interference/``, ``curvature/`` and ``theory/``; finite values only.

    Args:
        step: the step, grouped by prompt or not.
        sketch_rmse: the error of one cosine (``sketch_error.predicted_rmse``); 0 for exact inner products.
        features_PP: (P, P) inner products of the prompts' features, such as mean last hidden states, in any order.

    Returns:
        The metrics below. g_p is a prompt's gradient, K_pq = <g_p, g_q>, cos = K_pq / sqrt(K_pp K_qq) over pairs of
        different live prompts.

        * ``live_prompts``: number of prompts that have a gradient.
        * ``cos_mean``, ``cos_abs_mean``: means. ``cos_abs_mean`` includes the sketch's error: if all true cosines are 0
            it is 0.8 sketch_rmse.
        * ``cos_std``: sqrt(sample variance - sketch_rmse^2); missing if that is negative, or for a single pair.
        * ``near_orthogonal_frac``: share of pairs with abs cos < 0.1.
        * ``conflict_frac``: share of pairs with cos < -max(2 sketch_rmse, 0.001).
        * ``sum_ratio``: |sum g_p|^2 / sum |g_p|^2. It is 1 for orthogonal gradients, P for aligned ones, and below 1 if
            they cancel.
        * ``effective_rank``: trace(K)^2 / sum K_pq^2, between 1 and P. The sketch adds sketch_rmse^2 K_pp K_qq to each
            square off the diagonal, which is subtracted; it would cap the rank near 1 / sketch_rmse^2.
        * ``noise_scale``: (trace(K) / P - m) / m with m the mean of K off its diagonal: the number of prompts at which
            a step's signal equals its noise. P counts dead prompts too, which cost rollouts. Missing unless m > 0.
        * ``feature_cos_abs_mean``: mean absolute cosine of two prompts' features (paper, section 4.1).
        * ``sketch_rmse``: the argument, if there is a pair.
    """
    groups = group_by_prompt(step)
    metrics = _cosine_metrics(groups, sketch_rmse) | _sum_metrics(groups, sketch_rmse)
    if features_PP is not None:
        features_PP = features_PP.double()
        cosine_N = cosines(features_PP, features_PP.diagonal() > 0)
        metrics["feature_cos_abs_mean"] = _mean(cosine_N.abs())
    named = {f"interference/{name}": value for name, value in metrics.items()} | curvature_metrics(groups)
    return {name: value for name, value in named.items() if math.isfinite(value)}


def orthogonality(step: StepGradients | PromptGroups, sketch_rmse: float = 0.0) -> float | None:
    """Returns how orthogonal the prompts' gradients are, in [0, 1]; None if fewer than two prompts are live.

    It is min(1, near_orthogonal_frac / erf(0.1 / (sqrt(2) sketch_rmse))): the share of pairs with abs cos < 0.1,
    divided by the expected share in this sketch if all true cosines are 0. So it is 1 if no two prompts interfere, for
    any sketch error, and 0 if every two do. Opposed and aligned pairs count equally (in ``sum_ratio`` they cancel), and
    it doesn't fall with the number of prompts (``effective_rank / P`` does). At the paper's three stages it is 0.98,
    0.80 and 0.52, where 1 - mean abs cos is 0.96 to 0.89. Rollout noise moves it towards 1.
    """
    groups = group_by_prompt(step)
    cosine_N = cosines(groups.gram_PP, groups.live_P)
    if len(cosine_N) == 0:
        return None
    passing = math.erf(NEAR_ORTHOGONAL / (math.sqrt(2) * sketch_rmse)) if sketch_rmse > 0 else 1.0
    return min(1.0, _near_orthogonal_frac(cosine_N) / passing)


def _near_orthogonal_frac(cosine_N: torch.Tensor) -> float:
    return _mean((cosine_N.abs() < NEAR_ORTHOGONAL).double())


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()  # NaN without values, which interference_metrics drops


def _std(values: torch.Tensor, error: float = 0.0) -> float:
    """Returns the sample std after subtracting the variance ``error``^2; NaN for one value or a negative rest."""
    variance = values.var().item() - error**2 if len(values) > 1 else math.nan
    return math.sqrt(variance) if variance >= 0 else math.nan


def _pairs(matrix_PP: torch.Tensor) -> torch.Tensor:
    """Returns the entries above the diagonal."""
    row_N, column_N = torch.triu_indices(len(matrix_PP), len(matrix_PP), offset=1, device=matrix_PP.device)
    return matrix_PP[row_N, column_N]


def cosines(gram_PP: torch.Tensor, chosen_P: torch.Tensor) -> torch.Tensor:
    """Returns the cosines (N,) over pairs of the chosen prompts, whose squared norms must be positive."""
    gram_PP = gram_PP[chosen_P][:, chosen_P]
    norm_P = gram_PP.diagonal().sqrt()
    return _pairs(gram_PP / norm_P[:, None] / norm_P)


def _cosine_metrics(groups: PromptGroups, sketch_rmse: float) -> dict[str, float]:
    metrics = {"live_prompts": float(groups.live_P.sum())}
    cosine_N = cosines(groups.gram_PP, groups.live_P)
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
