"""The error that a sketch brings into the cosines of the prompts' gradients, predicted from the sketch itself.

Shapes: B sequences, P prompts, K the sketch's side.
"""

from __future__ import annotations

import torch


def predicted_rmse(sketch_BKK: torch.Tensor, prompt_B: torch.Tensor) -> float:
    """Root mean square error of one cosine of two prompts' gradients, as measured in this sketch.

    A sketch S = sum over layers and tokens of (R_out^T d)(R_in^T a)^T has rows that are identically distributed and
    independent given R_in, because the columns of R_out are; and columns likewise given R_out. So the inner product
    of two sketches is a sum over a k x k array z of crossed random effects, row + column + rest, and its variance is
    k^2 (MS_rows + MS_columns - MS_rest) by the two-way analysis of variance, without bias and without knowing the
    gradients. For a cosine, z is its linearisation (delta method), with sketches scaled to norm 1::

        z = S_p * S_q - cos / 2 * (S_p * S_p + S_q * S_q)          # elementwise, sums to 0

    The mean is over the pairs of prompts whose sketch isn't 0; 0.0 where there is no pair. (B, K, K) floating,
    (B,) int64.

    What it can't see is an error common to all rows and columns. Layers that share R and differ by signs of the
    **input** features (R_in = diag(signs) R) make one: products of different layers don't average out with k. Signs
    of the **sketch's** rows and columns, K of each drawn for every layer, cost less and give the accuracy of one R a
    layer; so R_in = R diag(signs).
    """
    if sketch_BKK.ndim != 3 or sketch_BKK.shape[1] != sketch_BKK.shape[2] or sketch_BKK.shape[1] < 2:
        raise ValueError(f"sketch_BKK has shape {tuple(sketch_BKK.shape)}: expected (B, K, K), K of at least 2")
    if tuple(prompt_B.shape) != (len(sketch_BKK),):
        raise ValueError(f"prompt_B has shape {tuple(prompt_B.shape)}: expected ({len(sketch_BKK)},)")
    if not sketch_BKK.isfinite().all():
        raise ValueError("sketch_BKK holds a value that isn't finite")
    k = sketch_BKK.shape[1]
    prompt_P, row_B = prompt_B.unique(return_inverse=True)
    sketch_PKK = sketch_BKK.new_zeros(len(prompt_P), k, k, dtype=torch.float64)
    sketch_PKK.index_add_(0, row_B, sketch_BKK.double())
    norm_P = sketch_PKK.flatten(1).norm(dim=1)
    sketch_PKK = sketch_PKK[norm_P > 0] / norm_P[norm_P > 0, None, None]
    n_prompts = len(sketch_PKK)
    if n_prompts < 2:
        return 0.0

    flat_PM = sketch_PKK.flatten(1)
    cosine_PP = flat_PM @ flat_PM.T

    def squared_sums(slices_KPM: torch.Tensor) -> torch.Tensor:
        """(P, P) sum over rows (or columns) of the square of z's sum in it."""
        total_PP = torch.zeros_like(cosine_PP)
        for slice_PM in slices_KPM:
            square_P = slice_PM.square().sum(1)
            total_PP += (slice_PM @ slice_PM.T - cosine_PP / 2 * (square_P[:, None] + square_P)).square()
        return total_PP

    rows_PP = squared_sums(sketch_PKK.transpose(0, 1)) / k
    columns_PP = squared_sums(sketch_PKK.permute(2, 0, 1)) / k
    # the sum of z^2, multiplied out into Gram matrices of powers
    square_PM = flat_PM.square()
    mixed_PP = (square_PM * flat_PM) @ flat_PM.T
    fourth_P = square_PM.square().sum(1)
    both_PP = square_PM @ square_PM.T
    total_PP = both_PP - cosine_PP * (mixed_PP + mixed_PP.T)
    total_PP += cosine_PP.square() / 4 * (fourth_P[:, None] + fourth_P + 2 * both_PP)

    rest_PP = (total_PP - rows_PP - columns_PP) / (k - 1) ** 2
    variance_PP = k**2 * ((rows_PP + columns_PP) / (k - 1) - rest_PP)
    variance_PP.fill_diagonal_(0.0)  # a prompt's cosine with itself has no error
    return (variance_PP.sum() / (n_prompts * (n_prompts - 1))).clamp(min=0).sqrt().item()
