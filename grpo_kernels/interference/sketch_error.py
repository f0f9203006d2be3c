"""The error that a sketch brings into the cosines of the prompts' gradients, predicted from the sketch itself.

Shapes: B sequences, P prompts, M parts of the sketch, K numbers in each.
"""

from __future__ import annotations

import torch

from .inner_products import sum_rows


def predicted_rmse(sketch_BMK: torch.Tensor, prompt_B: torch.Tensor) -> float:
    """Root mean square error of one cosine of two prompts' gradients, as measured in this sketch.

    The M parts of a sketch (``projections.py``) are independent sketches of the same gradients, and the cosine is made
    of the mean of their inner products. So the square of its error is on average 1 / (M (M - 1)) of the sum over the
    parts of z^2, z the part's departure from the mean (linearised; z sums to 0), with gradients of norm 1 in the mean::

        z = K_pq - cos / 2 * (K_pp + K_qq),    K the inner products in the part, times M

    The root of the mean over the pairs of prompts whose sketch isn't 0; 0.0 where there is no pair. It has (M - 1)
    degrees of freedom a pair: over few pairs it scatters, by about 1 / sqrt(2 (M - 1) pairs) of itself.
    (B, M, K) floating with M > 1, (B,) int64.
    """
    if sketch_BMK.ndim != 3 or sketch_BMK.shape[1] < 2 or sketch_BMK.numel() == 0:
        raise ValueError(f"sketch_BMK has shape {tuple(sketch_BMK.shape)}: expected (B, M > 1, K), not empty")
    if tuple(prompt_B.shape) != (len(sketch_BMK),):
        raise ValueError(f"prompt_B has shape {tuple(prompt_B.shape)}: expected ({len(sketch_BMK)},)")
    if not sketch_BMK.isfinite().all():
        raise ValueError("sketch_BMK holds a value that isn't finite")
    prompt_P, row_B = prompt_B.unique(return_inverse=True)
    sketch_PMK = sum_rows(sketch_BMK.double(), row_B, len(prompt_P))
    return rmse_of_parts(torch.einsum("pmk,qmk->mpq", sketch_PMK, sketch_PMK))


def rmse_of_parts(gram_MPP: torch.Tensor) -> float:
    """The same from the inner products of the prompts' gradients in each part, (M, P, P) float64.

    0.0 for one part, which is no sketch but the gradients themselves.
    """
    if gram_MPP.ndim != 3 or not len(gram_MPP) or gram_MPP.shape[1] != gram_MPP.shape[2]:
        raise ValueError(f"gram_MPP has shape {tuple(gram_MPP.shape)}: expected (M, P, P)")
    if len(gram_MPP) == 1:
        return 0.0
    norm_P = gram_MPP.diagonal(dim1=1, dim2=2).sum(0).sqrt()
    live_P = norm_P > 0
    n_parts, n_prompts = len(gram_MPP), int(live_P.sum())
    if n_prompts < 2:
        return 0.0
    norm_P = norm_P[live_P]
    gram_MPP = n_parts * gram_MPP[:, live_P][:, :, live_P] / norm_P[:, None] / norm_P
    cosine_PP, square_MP = gram_MPP.mean(0), gram_MPP.diagonal(dim1=1, dim2=2)
    z_MPP = gram_MPP - cosine_PP / 2 * (square_MP[:, :, None] + square_MP[:, None, :])
    squared_error_PP = z_MPP.square().sum(0) / (n_parts * (n_parts - 1))
    squared_error_PP.fill_diagonal_(0.0)
    return (squared_error_PP.sum() / (n_prompts * (n_prompts - 1))).sqrt().item()
