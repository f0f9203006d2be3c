"""Predicts, from a sketch itself, its error in the cosines of the prompts' gradients.

Shapes: B sequences, P prompts, M replicates of the sketch, K numbers in each.
"""

from __future__ import annotations

import torch

from .inner_products import sum_rows


def predicted_rmse(sketch_BMK: torch.Tensor, prompt_B: torch.Tensor) -> float:
    """Returns the predicted root mean square error of one cosine of two prompts' gradients in this sketch.

    The M replicates of a sketch (``projections.py``) are independent, and a cosine is made from the mean of their inner
    products. So the expected square of its error is sum z^2 / (M (M - 1)) over the replicates. z is a replicate's
    deviation from the mean (linearised; z sums to 0), for gradients whose mean norm is 1::

        z = K_pq - cos / 2 * (K_pp + K_qq),    K the inner products in the replicate, times M

    The estimate is the root of the mean over pairs of prompts whose sketch isn't 0. It has (M - 1) degrees of freedom
    per pair, so its own relative error is about 1 / sqrt(2 (M - 1) pairs).

    Args:
        sketch_BMK: (B, M, K) floating, M > 1.
        prompt_B: (B,) int64, the prompt of each sequence.

    Returns:
        The error; 0.0 if there is no pair.
    """
    prompt_P, row_B = prompt_B.unique(return_inverse=True)
    sketch_PMK = sum_rows(sketch_BMK.double(), row_B, len(prompt_P))
    return rmse_of_parts(torch.einsum("pmk,qmk->mpq", sketch_PMK, sketch_PMK))


def rmse_of_parts(gram_MPP: torch.Tensor) -> float:
    """Returns ``predicted_rmse`` from the prompts' inner products in each replicate, (M, P, P) float64.

    0.0 for a single replicate, which holds exact gradients.
    """
    if len(gram_MPP) == 1:
        return 0.0
    norm_P = gram_MPP.diagonal(dim1=1, dim2=2).sum(0).sqrt()
    live_P = norm_P > 0
    n_replicates, n_prompts = len(gram_MPP), int(live_P.sum())
    if n_prompts < 2:
        return 0.0
    norm_P = norm_P[live_P]
    gram_MPP = n_replicates * gram_MPP[:, live_P][:, :, live_P] / norm_P[:, None] / norm_P
    cosine_PP, square_MP = gram_MPP.mean(0), gram_MPP.diagonal(dim1=1, dim2=2)
    z_MPP = gram_MPP - cosine_PP / 2 * (square_MP[:, :, None] + square_MP[:, None, :])
    squared_error_PP = z_MPP.square().sum(0) / (n_replicates * (n_replicates - 1))
    squared_error_PP.fill_diagonal_(0.0)
    return (squared_error_PP.sum() / (n_prompts * (n_prompts - 1))).sqrt().item()
