"""Measures how far the sampler's distribution (vLLM's) is from the trainer's.

Shapes: B sequences, T padded completion positions.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.schema import Sequences


def sampler_metrics(batch: Sequences, accelerator: Any) -> dict[str, float]:
    """Returns metrics of the generated batch of all ranks; none if it lacks the sampler's or the trainer's log-probs.

    Let mu be the sampler, pi the trainer, and r = pi / mu the ratio of a token drawn from mu. Over tokens with both
    log-probs:

    * ``sampler/kl``: KL(mu || pi) in nats per token, estimated by the mean of r - 1 - log r. That is never negative,
      and its expectation is that of -log r because E[r] = 1.
    * ``sampler/chi_square``: chi^2(pi || mu) per token, the mean of (r - 1)^2.
    * ``sampler/ess_tokens``: effective sample size as a share of the tokens, (sum r)^2 / (n sum r^2).
    * ``sampler/ess``: the same over sequences, whose ratio is the product of their tokens' ratios. 1 means that the
      samples are as good as the trainer's own.
    """
    trainer_BT, sampler_BT = batch.old_logprobs, batch.sampling_logprobs
    if trainer_BT is None or sampler_BT is None:
        return {}
    log_ratio_BT = trainer_BT.double() - sampler_BT.double()
    mask_BT = batch.live_mask & ~log_ratio_BT.isnan()
    log_ratio_BT = log_ratio_BT.masked_fill(~mask_BT, 0.0)  # a ratio of 1
    ratio_BT = log_ratio_BT.exp()
    sums = [mask_BT, ratio_BT - 1 - log_ratio_BT, (ratio_BT - 1).square()]
    sums += [ratio_BT * mask_BT, ratio_BT.square() * mask_BT, log_ratio_BT]
    sums_B6 = accelerator.gather(torch.stack([values.double().sum(1) for values in sums], dim=1))
    sums_B6 = sums_B6[sums_B6[:, 0] > 0]
    if not len(sums_B6):
        return {}
    tokens, kl, chi_square, total, squares, _ = sums_B6.sum(0).tolist()
    weight_B = (sums_B6[:, 5] - sums_B6[:, 5].max()).exp()
    return {
        "sampler/kl": kl / tokens,
        "sampler/chi_square": chi_square / tokens,
        "sampler/ess_tokens": total**2 / (tokens * squares),
        "sampler/ess": float(weight_B.sum().square() / weight_B.square().sum()) / len(weight_B),
    }
