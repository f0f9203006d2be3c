"""Normalises the rewards of each prompt's completions to advantages.

Shapes: P prompts, G completions of one prompt, F reward functions.

Every method except ``rank`` is affine within a group, ``A = (r - centre) / scale``. Flow of this file: check the input;
compute statistics of the batch if the method needs them (``batch_statistics.py``); then one pass over the groups
(``group_statistics.py``, or one launch of ``triton_groups.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from grpo_kernels.backend import choose_backend

from .batch_statistics import batch_mean_and_std, beta_density, shrinkage
from .group_statistics import group_centre_and_scale, masked_statistics, mid_ranks
from .method import Groups
from .methods import METHODS, Method, canonical, check_normalization, function_name, option_or_default
from .normalized import Normalized
from .shared_options import limit_advantages, merge_equal

NUMBERS = ("batch_mean", "batch_std", "running_variance", "recent_mean")
FOR_FUNCTIONS = ("prompt_keys",)
TENSORS = ("lengths", "function_rewards", "function_weights", "curvature_scale", "role_baseline")
CONTEXT = (*NUMBERS, *TENSORS, *FOR_FUNCTIONS)


def _check_rewards(rewards_PG: torch.Tensor) -> None:
    if not isinstance(rewards_PG, torch.Tensor) or not rewards_PG.is_floating_point():
        kind = rewards_PG.dtype if isinstance(rewards_PG, torch.Tensor) else type(rewards_PG).__name__
        raise ValueError(f"rewards_PG must be a floating-point tensor, got {kind}")
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] == 0:
        raise ValueError(
            f"rewards_PG has shape {tuple(rewards_PG.shape)}: expected (P, G), a row of at least one reward a prompt"
        )
    infinite = torch.isinf(rewards_PG)
    if infinite.any():
        row, column = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"rewards_PG[{row}, {column}] is {rewards_PG[row, column].item()}: rewards must be finite, "
            "or NaN for a completion that could not be scored"
        )


def _check_unit_rewards(rewards_PG: torch.Tensor, method: str) -> None:
    outside = (rewards_PG < 0) | (rewards_PG > 1)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"rewards_PG[{row}, {column}] is {rewards_PG[row, column].item():g}: normalization {method!r} needs "
            "rewards in [0, 1]"
        )


def _check_context(context: Mapping[str, Any], method: str, rewards_PG: torch.Tensor) -> None:
    for name, value in context.items():
        if name not in CONTEXT:
            raise ValueError(f"context has no entry {name!r}: it takes {', '.join(CONTEXT)}")
        if name in NUMBERS:
            try:
                finite = math.isfinite(value)
            except (TypeError, ValueError, RuntimeError):
                finite = False
            signed = name in ("batch_mean", "recent_mean")
            if not finite or (not signed and value < 0):
                sign = "" if signed else ", not negative"
                raise ValueError(f"context[{name!r}]={value!r} must be a finite number{sign}")
    for name in METHODS[method].needs:
        if name not in context:
            where = " (the trainer carries it from step to step)" if METHODS[method].kind == "state" else ""
            raise ValueError(f"normalization {method!r} needs context[{name!r}]{where}")
    shapes = {
        "lengths": tuple(rewards_PG.shape),
        "function_rewards": (*rewards_PG.shape, -1),
        "curvature_scale": (len(rewards_PG),),
        "role_baseline": tuple(rewards_PG.shape),
    }
    for name in shapes.keys() & set(METHODS[method].needs):
        _check_tensor(name, context[name], shapes[name])
    if method == "decoupled":
        n_functions = context["function_rewards"].shape[2]
        if "function_weights" in context:
            _check_tensor("function_weights", context["function_weights"], (n_functions,))


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    right = isinstance(value, torch.Tensor) and value.ndim == len(shape)
    if not right or any(want not in (-1, got) for want, got in zip(shape, value.shape, strict=True)):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        wanted = str(shape).replace("-1", "F")
        raise ValueError(f"context[{name!r}] is {got}: expected a tensor {wanted}")
    if value.isinf().any() or (name != "function_rewards" and value.isnan().any()):
        raise ValueError(f"context[{name!r}] holds a value that isn't finite")
    if name in ("lengths", "curvature_scale") and (value < 0).any():
        raise ValueError(f"context[{name!r}] holds {value.min().item():g}: expected nothing negative")


def _given(rewards_PG: torch.Tensor, method: str, eps: float, context: Mapping[str, Any]):
    """Returns centre and scale (P, 1) that don't come from the group itself; None for those that do."""
    ones_P1 = torch.ones_like(rewards_PG[:, :1])
    if method in ("batch_mean", "batch_std", "global"):
        mean, std = batch_mean_and_std(rewards_PG, context)
        centre = None if method == "batch_std" else mean * ones_P1
        return centre, None if method == "batch_mean" else (std + eps) * ones_P1
    if method == "shrinkage":
        return shrinkage(rewards_PG)
    if method == "beta":
        return None, beta_density(rewards_PG)
    if method == "running_std":
        return None, (math.sqrt(context["running_variance"]) + eps) * ones_P1
    if method == "curvature":
        return None, context["curvature_scale"].to(rewards_PG)[:, None] + eps
    return None, None


def _normalize_by_method_function(rewards_PG: torch.Tensor, name: str, eps: float, context, options) -> Normalized:
    """Normalises by ``Method.function``; like ``rank``, it has neither centre nor scale."""
    method, scorable = METHODS[name], ~rewards_PG.isnan()
    assert method.function is not None
    count, mean, std = masked_statistics(rewards_PG, scorable, dim=(1,))
    own = {option: option_or_default(name, options, option) for option in method.options}
    advantages_PG = method.function(Groups(rewards_PG, count, mean, std, eps, own, context))
    live = scorable & (std > 0) if method.zero_if_equal else scorable
    unknown_P = torch.full_like(rewards_PG[:, 0], torch.nan)
    return Normalized(torch.where(live, advantages_PG, 0.0), unknown_P, unknown_P)


def _normalize_torch(rewards_PG, method: Method, eps, alpha, centre_P1, scale_P1, lengths_PG) -> Normalized:
    scorable = ~rewards_PG.isnan()
    own_centre, own_scale = group_centre_and_scale(rewards_PG, method.centre, method.scale, eps, alpha, lengths_PG)
    centre_P1 = own_centre if centre_P1 is None else centre_P1
    scale_P1 = own_scale if scale_P1 is None else scale_P1
    if method.scale == "rank":
        count = scorable.sum(1, keepdim=True).to(rewards_PG.dtype)
        advantages_PG = (mid_ranks(rewards_PG, scorable) - (count + 1) / 2) / ((count - 1) / 2).clamp(min=0.5)
        centre_P1 = scale_P1 = torch.full_like(centre_P1, torch.nan)
    else:
        # a scale of 0 (eps = 0 and equal rewards) has only deviations of 0
        safe = torch.where(scale_P1 > 0, scale_P1, 1.0)
        advantages_PG = torch.where(scale_P1 > 0, (rewards_PG - centre_P1) / safe, 0.0)
    return Normalized(torch.where(scorable, advantages_PG, 0.0), centre_P1[:, 0], scale_P1[:, 0])


def normalize_then_sum(
    rewards_PGF: torch.Tensor,
    weights_F: torch.Tensor,
    normalize_function: Callable[[torch.Tensor, int], Normalized],
    eps: float = 1e-4,
) -> Normalized:
    """Normalises each reward function, sums with weights, and whitens the sum over the batch (GDPO, arXiv 2601.05242).

    A function's NaN entry adds nothing. A completion that no function scored gets 0 and isn't in the whitening's
    statistics. With ``std`` this is TRL's ``multi_objective_aggregation="normalize_then_sum"``. A sum of exactly 0 (a
    group of equal rewards) stays 0 if the batch's mean is 0 up to rounding.

    Args:
        rewards_PGF: (P, G, F), NaN where unscorable.
        weights_F: (F,).
        normalize_function: ``(rewards_PG, f)`` normalises function f.
        eps: added to the std of the whitening.
    """
    each = [normalize_function(rewards_PGF[:, :, f], f) for f in range(rewards_PGF.shape[2])]
    sum_PG = sum(weight * one.advantages for weight, one in zip(weights_F.unbind(), each, strict=True))
    sum_PG = torch.where(rewards_PGF.isnan().all(dim=2), torch.nan, sum_PG)
    advantages_PG = normalize_rewards(sum_PG, "global", eps=eps)
    residue = sum_PG.nanmean().abs() <= 8 * torch.finfo(sum_PG.dtype).eps * sum_PG.abs().nan_to_num().amax()
    advantages_PG = torch.where((sum_PG == 0) & residue, 0.0, advantages_PG)
    return Normalized(advantages_PG, *(torch.stack(parts, dim=1) for parts in list(zip(*each, strict=True))[1:]))


def _normalize_by_function(function, rewards_PG, context, options) -> Normalized:
    advantages_PG = function(rewards_PG, context, **options)
    name = function_name(function)
    if not isinstance(advantages_PG, torch.Tensor) or advantages_PG.shape != rewards_PG.shape:
        got = tuple(advantages_PG.shape) if isinstance(advantages_PG, torch.Tensor) else type(advantages_PG).__name__
        raise ValueError(f"normalization {name} returned {got}: expected a tensor {tuple(rewards_PG.shape)}")
    scorable = ~rewards_PG.isnan()
    wrong = scorable & ~advantages_PG.isfinite()
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"normalization {name} returned {advantages_PG[row, column].item()} at [{row}, {column}], for the rewards "
            f"{[round(reward, 6) for reward in rewards_PG[row].tolist()]}"
        )
    unknown_P = torch.full_like(rewards_PG[:, 0], torch.nan)
    advantages_PG = torch.where(scorable, advantages_PG, 0.0).to(rewards_PG)
    return Normalized(advantages_PG.detach(), unknown_P, unknown_P)


def normalize_rewards(
    rewards_PG: torch.Tensor,
    method: str | Callable[..., torch.Tensor] = "std",
    *,
    eps: float = 1e-4,
    context: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Computes the advantages of P groups of G rewards, ``A = (r - centre) / scale``.

    m, s and n are mean, sample std (ddof=1) and number of a group's scorable rewards. mu is the batch's mean, "all" are
    the batch's rewards. The third column is the advantage in a group of equal rewards; "0" is exactly 0::

        none             r                                            r      REINFORCE
        mean             r - m                                        0      Dr. GRPO, arXiv 2503.20783
        batch_mean       r - mu                                       r - mu
        loo              r - mean of the others                       0      RLOO, arXiv 2402.14740
        std              (r - m) / (s + eps)                          0      GRPO, arXiv 2402.03300
        batch_std        (r - m) / (std of all + eps)                 0      Lite PPO, arXiv 2508.08221
        global           (r - mu) / (std of all + eps)                not 0  REINFORCE++, arXiv 2501.03262
        power            (r - m) / (s + eps)^alpha                    0      arXiv 2607.00152: 0 is mean, 1 is std
        mean_abs         (r - m) / (mean |r - m| + eps)               0      DGPO's scale, arXiv 2601.20614
        median_mad       (r - median) / (median |r - median| + eps)   0      MC-GRPO, arXiv 2601.22582
        iqr              (r - median) / (Q75 - Q25 + eps)             0      robust statistics
        rank             mid-rank, centred, scaled to [-1, 1]         0      GOPO, arXiv 2602.03876
        max_rl           (r - m) / (m + eps)                          0      MaxRL, arXiv 2602.02710; r in [0, 1]
        length_weighted  r - sum(length r) / sum(length)              0      OPO, arXiv 2505.23585; lengths
        shrinkage        r - [(1 - lam) loo + lam mu of the others]   not 0  JSPO, arXiv 2511.03710
        beta             (r - m) / Beta pdf at m                      0      BNPO, arXiv 2506.02864; r in [0, 1]
        decoupled        each function by std, summed, whitened       ~0     GDPO, arXiv 2601.05242; function_rewards
        running_std      (r - m) / (sqrt(running_variance) + eps)     0      second moment; arXiv 2601.23135
        curvature        (r - m) / (curvature_scale + eps)            0      arXiv 2601.23135, measured; r in [0, 1]
        value_to_go      (r - m) / sqrt(m + 1/n)                      0      ``functions.py``; r in [0, 1]
        pass_at_k        Pass@k Training in closed form               0      ``functions.py``; r = 0 or 1
        max_at_k         mean lead over the best of k - 1 others      0      ``functions.py``: PKPO, verl's grpo_passk
        ha_dw            std, weighted by exp(+-(m - recent_mean))    0      ``functions.py``: HA-DW; r in [0, 1]
        rae              r - role_baseline                            not 0  ``functions.py``: RAE of SPIRAL

    In plain torch, ``std`` is::

        m, s = rewards_PG.mean(1, keepdim=True), rewards_PG.std(1, keepdim=True)
        advantages_PG = (rewards_PG - m) / (s + eps)

    A NaN reward (of a completion that couldn't be scored) is in no statistic and gets advantage 0. A group with fewer
    than two scorable completions is treated like a group of equal rewards. Quantiles are interpolated like numpy's. If
    MAD or IQR is less than a hundredth of the std (often it is 0, for example with one success in eight), the std
    replaces it; their advantages are therefore at most ``100 ((n - 1) / sqrt(n) + 1)``. ``batch_statistics.py`` defines
    ``shrinkage`` and ``beta``.

    Args:
        rewards_PG: (P, G), any floating dtype. P may be 0. Half precision is computed in float32.
        method: a name in ``METHODS``, or a function ``f(rewards_PG, context, **options) -> advantages_PG``. It gets the
            rewards in float32 (float64 for float64), NaN where unscorable, and ``context``. It must return finite
            advantages (P, G); those of unscorable completions are set to 0.
        eps: added to a scale that is in units of reward.
        context: additional inputs, by name:

            * ``batch_mean``, ``batch_std`` (numbers or 0-d tensors): statistics of the batch's scorable rewards
              (ddof=1), if ``rewards_PG`` is a part of the batch. ``shrinkage`` and ``beta`` need the full batch.
            * ``lengths`` (P, G): tokens of each completion.
            * ``function_rewards`` (P, G, F), NaN where missing; ``function_weights`` (F,), 1 by default.
            * ``running_variance``, ``curvature_scale`` (P,), ``recent_mean``, ``role_baseline`` (P, G), in units of
              reward: states that the trainer keeps from step to step.
            * ``prompt_keys`` (P,): for a user's function.
        options: the method's own: ``alpha`` in [0, 1] for ``power``, ``k`` for ``pass_at_k`` and ``max_at_k``. (Only
            the trainer uses ``decay`` and ``window``, of methods with a state.) And for every named method:

            * ``clip``: the largest absolute advantage; it is applied last.
            * ``tolerance``: a group whose rewards differ by at most this is a group of equal rewards, all its mean.
            * ``keep_variance`` in (0, 1]: only the groups of largest reward variance, as few as hold this share of all
              groups' summed variance, keep their advantages; the others get 0. It needs the full batch.

    Returns:
        (P, G) on the same device; float64 for float64 rewards, else float32. ``normalize_with_statistics`` also
        returns each group's centre and scale.

    Raises:
        ValueError: the method, an option or an entry of ``context`` is unknown, missing, out of range or has the wrong
            shape; ``rewards_PG`` isn't a floating-point matrix, holds an infinity, or is outside [0, 1] (for ``beta``,
            ``max_rl``, ``curvature``); a function's result has the wrong shape or isn't finite.
    """
    return normalize_with_statistics(rewards_PG, method, eps=eps, context=context, **options).advantages


def normalize_with_statistics(
    rewards_PG: torch.Tensor,
    method: str | Callable[..., torch.Tensor] = "std",
    *,
    eps: float = 1e-4,
    context: Mapping[str, Any] | None = None,
    **options: Any,
) -> Normalized:
    """Computes ``normalize_rewards``, and returns also the centre and scale of each group."""
    method = canonical(method)
    check_normalization(method, eps=eps, **options)
    _check_rewards(rewards_PG)
    context = context or {}
    dtype = torch.promote_types(rewards_PG.dtype, torch.float32)
    rewards_PG = rewards_PG.to(dtype)
    if callable(method):
        return _normalize_by_function(method, rewards_PG, context, options)
    _check_context(context, method, rewards_PG)
    if METHODS[method].unit_rewards:
        _check_unit_rewards(rewards_PG, method)

    limits = {name: options.pop(name) for name in ("clip", "keep_variance") if name in options}
    normalized = _normalize_named(rewards_PG, method, eps, context, options)
    return limit_advantages(normalized, rewards_PG, **limits)


def _normalize_named(rewards_PG: torch.Tensor, method: str, eps: float, context, options) -> Normalized:
    """Normalises by a method of ``METHODS``; ``options`` are its own and ``tolerance``."""
    if rewards_PG.numel() == 0:
        return Normalized(rewards_PG.clone(), rewards_PG.new_empty(0), rewards_PG.new_empty(0))
    tolerance = options.get("tolerance", 0.0)
    if method == "decoupled":
        function_rewards_PGF = context["function_rewards"].to(rewards_PG)
        weights_F = context.get("function_weights", rewards_PG.new_ones(function_rewards_PGF.shape[2])).to(rewards_PG)
        std = partial(normalize_with_statistics, method="std", eps=eps, tolerance=tolerance)
        return normalize_then_sum(function_rewards_PGF, weights_F, lambda column_PG, _: std(column_PG), eps)
    dtype, merged_PG = rewards_PG.dtype, merge_equal(rewards_PG.double(), tolerance)
    if METHODS[method].function is not None:
        normalized = _normalize_by_method_function(merged_PG, method, eps, context, options)
        return Normalized(*(values.to(dtype) for values in normalized))
    # Triton passes scalars as float32, so float64 rewards (which tests use) run in torch on every device
    in_triton = dtype == torch.float32 and choose_backend(rewards_PG.device) == "triton"
    # In float64 a group of rewards 1000 + 0.001 u keeps its digits, and rewards of 3e38 don't overflow.
    normalized = _normalize(merged_PG, method, eps, context, options, in_triton)
    return Normalized(*(values.to(dtype) for values in normalized))


def _normalize(rewards_PG, method: str, eps: float, context, options, in_triton: bool) -> Normalized:
    alpha = float(options.get("alpha", 1.0))
    if method == "power" and alpha in (0.0, 1.0):  # exactly equal to these methods
        method = "std" if alpha else "mean"
    centre_P1, scale_P1 = _given(rewards_PG, method, eps, context)
    lengths_PG = None
    if method == "length_weighted":  # if all completions of a group have length 0, its plain mean
        lengths_PG = context["lengths"].to(rewards_PG)
        scorable_length = torch.where(rewards_PG.isnan(), 0.0, lengths_PG).sum(1, keepdim=True)
        lengths_PG = torch.where(scorable_length > 0, lengths_PG, 1.0)

    if in_triton:
        from .triton_groups import normalize_groups

        return normalize_groups(rewards_PG, METHODS[method], eps, alpha, centre_P1, scale_P1, lengths_PG)
    return _normalize_torch(rewards_PG, METHODS[method], eps, alpha, centre_P1, scale_P1, lengths_PG)
