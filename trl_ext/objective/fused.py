"""Computes the loss in one pass inside the model's forward: backbone, head, loss and the head's gradients.

Shapes: B sequences of a micro-batch, T completion positions, C columns of prompt and completion, N live tokens in the
order of the (B, T) mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.head.loss_checks import check_loss_options
from grpo_kernels.head.token_losses import SURROGATES
from trl_ext.compat import LossSettings
from trl_ext.head.forward import HeadCall
from trl_ext.schema import Sequences

from .interface import LossContext, LossResult, Method
from .statistics import sequence_statistics


def why_not_fused(settings: LossSettings, batch: Sequences) -> str | None:
    """Returns why this loss isn't a sum over single tokens, so that TRL must compute it; None if it is one."""
    if settings.own_logprobs is not None:
        return settings.own_logprobs
    if settings.loss_type not in SURROGATES:
        return f"loss_type={settings.loss_type!r} weighs whole sequences"
    if settings.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={settings.top_entropy_quantile} depends on the entropies of all tokens"
    if settings.off_policy_mask_threshold is not None:
        return f"off_policy_mask_threshold={settings.off_policy_mask_threshold} masks whole sequences"
    if settings.use_adaptive_entropy:
        return "use_adaptive_entropy steers the entropy bonus by its own count"
    if settings.importance_sampling_level != "token":
        if batch.old_logprobs is not None:
            return "importance_sampling_level='sequence' off policy"
        if settings.beta != 0 and settings.kl_times_ratio:
            return "importance_sampling_level='sequence' with KL times the ratio"
    if batch.has_images:
        return "the batch has images"
    try:
        check_loss_options(**loss_options(settings))
    except ValueError as error:  # TRL accepts some values that our loss refuses
        return str(error)
    return None


def loss_options(settings: LossSettings) -> Mapping[str, Any]:
    """Returns the loss's options by ``linear_grpo_loss``'s names."""
    return {
        "epsilon": settings.epsilon_low,
        "loss_type": settings.loss_type,
        "epsilon_high": settings.epsilon_high,
        "delta": settings.delta,
        "sapo_temperatures": settings.sapo_temperatures,
        "beta": settings.beta,
        "kl_times_ratio": settings.kl_times_ratio,
    }


def advantage_inputs(batch: Sequences, method: Method | None, place_N: tuple[torch.Tensor, ...]) -> Mapping[str, Any]:
    """Returns the arguments of ``linear_grpo_loss`` for advantages, or for rewards if there is a ``method``.

    With a ``method`` (the run's normalisation, if it needs only a group's own rewards) the kernel normalises the
    rewards itself, by the same definition as the trainer.
    """
    if method is not None:
        rewards = (batch.group_rewards, batch.group_position)
        return {"advantages": None, "rewards": rewards, "normalization": method}
    advantages = batch.advantages
    if advantages.dim() == 2:  # (B, T), from a subclass
        return {"advantages": None, "advantages_N": advantages.expand(-1, batch.width)[place_N]}
    return {"advantages": advantages}


def completion_labels(input_ids_BC: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Returns labels (B, C): token ids at completion positions where the mask (B, T) is True, -100 elsewhere."""
    labels_BC = torch.full_like(input_ids_BC, -100)
    width = mask_BT.shape[1]
    labels_BC[:, -width:] = torch.where(mask_BT, input_ids_BC[:, -width:], -100)
    return labels_BC


def loss_inputs(batch: Sequences, context: LossContext, mask_BT: torch.Tensor) -> Mapping[str, Any]:
    """Returns the arguments of ``linear_grpo_loss``, except hidden states, weight and targets."""
    settings, accumulation = context.settings, context.accumulation
    place_N = mask_BT.nonzero(as_tuple=True)  # the only read of a GPU here
    policy_scale_N = None
    if settings.importance_correction:
        policy_scale_N = batch.importance_ratio.expand(mask_BT.shape)[place_N].float()
    old_BT = batch.old_logprobs
    return {
        "sequence_N": place_N[0],
        "weights_B": context.weights_B / accumulation,
        **advantage_inputs(batch, context.method, place_N),
        "old_logprobs_N": None if old_BT is None else old_BT[place_N],
        "ref_logprobs_N": batch.ref_logprobs[place_N] if settings.beta != 0 else None,
        "policy_scale_N": policy_scale_N,
        **loss_options(settings),
        "entropy_coef": settings.entropy_coef / accumulation if settings.entropy_bonus else 0.0,
    }


@dataclass(frozen=True)
class FusedObjective:
    """Computes TRL's loss in one pass, if it is a sum over single tokens.

    ``autocast`` returns the context in which the forward runs.
    """

    autocast: Callable[[], AbstractContextManager[Any]]

    def why_not(self, settings: LossSettings, batch: Sequences) -> str | None:
        """Returns why this micro-batch's loss can't be computed in one pass, or None if it can."""
        return why_not_fused(settings, batch)

    def loss(self, model: torch.nn.Module, batch: Sequences, context: LossContext) -> LossResult:
        """Returns the loss and its statistics, from one forward pass."""
        settings, accumulation = context.settings, context.accumulation
        mask_BT, input_ids_BC = batch.live_mask, batch.input_ids
        inputs = loss_inputs(batch, context, mask_BT)
        with self.autocast():
            output = model(
                input_ids=input_ids_BC,
                attention_mask=batch.attention_mask,
                labels=completion_labels(input_ids_BC, mask_BT),
                fused_lm_head=True,
                head_call=HeadCall(inputs, batch.prompt_width if context.shared else None),
                **({"output_router_logits": True} if settings.aux_loss else {}),
                **batch.token_types,
            )
        loss = output.grpo_loss
        if settings.aux_loss:
            loss = loss + settings.aux_loss_coef * output.aux_loss / accumulation
        # TRL logs the policy loss before it divides by the accumulation, except for dapo and cispo
        policy_loss = output.policy_loss * (1.0 if settings.loss_type in ("dapo", "cispo") else accumulation)
        return LossResult(
            loss=loss,
            statistics_BS=sequence_statistics(output, inputs["sequence_N"], len(mask_BT), settings),
            policy_loss=policy_loss.detach(),
            aux_loss=None if output.aux_loss is None else output.aux_loss.detach(),
        )
