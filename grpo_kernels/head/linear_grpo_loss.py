"""Computes the GRPO loss and its gradients from hidden states and advantages (or rewards), tile by tile of logits.

Shapes: N live tokens, C tokens of a tile, B sequences, G completions of one prompt, H hidden, V vocabulary.

dL/dlogits of a row depends on its log-sum-exp and on dL/dlogprob. For losses on single tokens, dL/dlogprob is known as
soon as the row's log-prob is. So each tile of logits is computed once and turned into its own gradient. That costs
2 N V H operations for the logits, 2 f N V H for dL/dhidden and, with a trainable weight, 2 f N V H for dL/dweight,
where f is the share of rows whose dL/dlogprob isn't zero.

Flow: checks (``loss_operator.py``) -> order of the rows, those that can have a gradient first -> for each tile: product
-> row arithmetic (``loss_tiles.py``, ``rows/``) -> products for the gradients of a window of tiles (``products.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.memory import cast, scaled

from .derivatives import once_differentiated, without_autocast
from .loss_operator import DETAILS, LossNumbers, loss_in_a_graph, make_call
from .loss_tiles import run_loss
from .products import HeadSketch


@dataclass
class GRPOLoss:
    """The loss, with its graph, and detached values of each token in float32 (float64 for float64).

    Attributes:
        loss: 0-d, with its graph; call ``backward`` on it.
        policy_loss: 0-d, the loss without the entropy bonus.
        logprobs, entropies: (N,), in nats.
        ratio: (N,), exp(logprob - old logprob); 1 on policy.
        clipped: (N,) bool, whether clipping removes the token's policy gradient, or (cispo) limits it.
        kl: (N,), multiplied by the ratio with ``kl_times_ratio``; None without reference log-probs.
        advantages: (N,), the advantage of each token.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor | None
    advantages: torch.Tensor


class LinearGRPOLossFunction(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, call, grad_enabled, hidden, weight, bias, low_inputs, low_weight):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[2:]]
        found = run_loss(call, needs, (hidden, weight, bias, low_inputs, low_weight))
        ctx.units, ctx.totals, ctx.sketch, ctx.projected = found.units, found.totals, call.sketch, found.projected
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, low_inputs, low_weight)]
        details = (found.policy_loss, *(found.logs[name] for name in DETAILS))
        ctx.mark_non_differentiable(*details)
        return (found.loss, *details)

    @staticmethod
    @once_differentiated
    def backward(ctx, loss_grad, *_):
        if ctx.totals is None:
            raise RuntimeError("the backward of linear_grpo_loss was called before, without retain_graph")
        totals = ctx.totals
        if torch._C._autograd._get_current_graph_task_keep_graph():
            totals = [None if total is None else total.clone() for total in totals]
        else:
            ctx.totals = None  # they are scaled in place and returned
        if ctx.sketch is not None and ctx.projected is not None:
            with ctx.sketch.guarded():
                ctx.sketch.add(ctx.projected * loss_grad)
        # saves a pass over (V, H) that multiplies by 1; on a GPU the check would have to wait for the device
        is_one = loss_grad.device.type == "cpu" and loss_grad.item() == 1.0

        def finish(total, unit, dtype):
            if total is None or (is_one and unit is None):
                return None if total is None else cast(total, dtype)
            return scaled(total, loss_grad if unit is None else loss_grad * unit, dtype)

        grads = [finish(*one) for one in zip(totals, ctx.units, ctx.dtypes, strict=True)]
        return (None, None, *grads)


@torch.compiler.disable
def _eager(operands: Any, tensors: Any, rewards: Any, normalization: Any, per_token: Any, numbers: Any, sketch: Any):
    call = make_call(operands, tensors, rewards, normalization, per_token, numbers, sketch)
    return LinearGRPOLossFunction.apply(call, torch.is_grad_enabled(), *operands)


def linear_grpo_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    sequence_N: torch.Tensor,
    advantages: torch.Tensor | None,
    weights_B: torch.Tensor,
    *,
    advantages_N: torch.Tensor | None = None,
    rewards: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalization: tuple[str, Mapping[str, float]] | None = None,
    old_logprobs_N: torch.Tensor | None = None,
    ref_logprobs_N: torch.Tensor | None = None,
    policy_scale_N: torch.Tensor | None = None,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    beta: float = 0.0,
    kl_times_ratio: bool = True,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    head_sketch: HeadSketch | None = None,
    float32_logits: bool = True,
) -> GRPOLoss:
    """Computes the GRPO loss of N tokens, and its gradients by hidden states and head, without the (N, V) logits.

    The same in plain torch, with the full logits, for ``loss_type="grpo"``::

        logprobs, entropies = linear_logprob(hidden_NH, weight_VH, targets_N, entropy=True)
        ratio = (logprobs - (logprobs.detach() if old_logprobs_N is None else old_logprobs_N)).exp()
        A, w = advantages[sequence_N], weights_B[sequence_N]
        policy = -torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A) * policy_scale_N
        k3 = (ref_logprobs_N - logprobs).exp() - (ref_logprobs_N - logprobs) - 1
        loss = (w * (policy + beta * k3 * ratio)).sum() - entropy_coef * entropies.mean()

    The forward computes the gradients, and ``backward`` scales them. A token whose dL/dlogprob is zero gets a log-prob
    and an entropy, but takes no part in the gradients' products. Its dL/dlogprob is zero if it is clipped, or if its
    advantage or weight is 0 and neither beta nor entropy_coef is set. On a GPU clipped tokens take part in the
    products, with factor 0: to leave them out, Python would wait for the device.

    Args:
        hidden_NH: (N, H), live completion tokens only, float32, bfloat16, float16 or float64. N may be 0.
        weight_VH: (V, H).
        targets_N: (N,), the sampled tokens, in [0, V).
        sequence_N: (N,) integers, the sequence of each token, in [0, B).
        advantages: (B,), one per sequence, or (N,), one per token. If B = N, they are per sequence.
        advantages_N: (N,), one per token, instead of ``advantages``.
        weights_B: (B,), the weight of one token of each sequence: grpo and sapo 1 / (B len), bnpo 1 / N, dr_grpo
            1 / (B max_len), dapo and cispo 1 / tokens of the global batch, luspo 1 / B. Include the division by the
            number of gradient accumulation steps.
        rewards: instead of advantages: ((B, G) the rewards of each sequence's group, (B,) its position in the group).
            The Triton backend computes baseline, scale and gradient in the same launch.
        normalization: with ``rewards``, (method, options) as for ``normalize_rewards``; default std. Only methods that
            need no other group's rewards are allowed.
        old_logprobs_N: (N,), of the policy that sampled the tokens; None on policy, where every ratio is 1.
        ref_logprobs_N: (N,), of the reference model, for KL.
        policy_scale_N: (N,), multiplies the policy term but not KL (vLLM's importance correction).
        loss_type: grpo, bnpo, dr_grpo, dapo, luspo (token-level): the clipped surrogate; cispo; sapo. As in TRL.
        epsilon: the clip range is 1 - epsilon to 1 + epsilon_high.
        epsilon_high: default epsilon. For cispo, the ratio is capped at epsilon_high itself.
        delta: an upper bound of the ratio, also for negative advantages (dual clip); clipped surrogate only.
        sapo_temperatures: for positive advantages, and for all others.
        beta: weight of KL.
        kl_times_ratio: whether KL is multiplied by the ratio, in its gradient too. True is TRL's default.
        entropy_coef: weight of the mean entropy of the N tokens, which is subtracted from the loss.
        temperature: as in ``linear_logprob``, and so are bias, low_rank, logit_scale, softcap, head_sketch and
            float32_logits.

    Returns:
        ``GRPOLoss``.

    Raises:
        ValueError: for shapes, devices or dtypes that don't fit, targets outside the vocabulary, an unknown loss type,
            numbers out of range, both or neither of rewards and advantages.

    Source:
        GRPO, arXiv 2402.03300; Dr. GRPO, 2503.20783; DAPO, 2503.14476; CISPO, 2506.13585; SAPO, 2511.20347.
    """
    tensors = (targets_N, sequence_N, weights_B, advantages, advantages_N)
    per_token = (old_logprobs_N, ref_logprobs_N, policy_scale_N)
    numbers = LossNumbers(
        loss_type,
        epsilon,
        epsilon_high,
        delta,
        sapo_temperatures,
        beta,
        kl_times_ratio,
        entropy_coef,
        temperature,
        logit_scale,
        softcap,
        float32_logits,
    )
    operands = (hidden_NH, weight_VH, bias, *((None, None) if low_rank is None else low_rank))
    if torch.compiler.is_compiling() and head_sketch is None:
        found = loss_in_a_graph(operands, tensors, rewards, normalization, per_token, numbers)
    else:
        found = _eager(operands, tensors, rewards, normalization, per_token, numbers, head_sketch)
    loss, policy_loss, logprobs, entropies, ratio, clipped, kl, token_advantages_N = found
    kl = kl if ref_logprobs_N is not None else None
    return GRPOLoss(loss, policy_loss, logprobs, entropies, ratio, clipped, kl, token_advantages_N)
