"""The loss in one pass inside the model's forward.

Shapes: B sequences of a micro-batch, T completion positions, N live tokens, in the order of the (B, T) mask.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels.head.loss_checks import check_loss_options
from grpo_kernels.head.token_losses import SURROGATES
from trl_ext.trl_surface import IMAGES, LOGPROBS, TOKEN_TYPES, LossSettings

from .statistics import OnePass, sequence_statistics
from .token_weights import live_mask


def why_not_one_pass(settings: LossSettings, batch: dict[str, Any]) -> str | None:
    """What of this micro-batch's loss isn't a sum over single tokens (TRL then computes it on our head), or None."""
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
        if batch.get("old_per_token_logps") is not None:
            return "importance_sampling_level='sequence' off policy"
        if settings.beta != 0 and settings.kl_times_ratio:
            return "importance_sampling_level='sequence' with KL times the ratio"
    if any(batch.get(name) is not None for name in IMAGES):
        return "images travel with the rows"
    try:
        check_loss_options(**loss_options(settings))
    except ValueError as error:  # what TRL computes with, and we refuse
        return str(error)
    return None


def rewards_or_advantages(settings: LossSettings, batch: dict[str, Any], mask_BT: torch.Tensor) -> dict[str, Any]:
    """The kernel normalises the group's rewards itself where the method needs nothing else of the batch."""
    made, advantages = batch.get("made_advantages"), batch["advantages"]
    own = made is not None and made.shape == advantages.shape and torch.equal(made, advantages)  # not a subclass's
    if own and settings.own_group is not None and "group_rewards" in batch:
        return {
            "advantages": None,
            "rewards": (batch["group_rewards"], batch["group_position"]),
            "normalization": settings.own_group,
        }
    if advantages.dim() == 2:  # of a subclass: one for each token
        return {"advantages": None, "advantages_N": advantages.expand(mask_BT.shape)[mask_BT]}
    return {"advantages": advantages}


def without_tool_logprobs(batch: dict[str, Any]) -> dict[str, Any]:
    """For TRL's loss on our head: what isn't projected has log-prob 0, and so have the old ones.

    Were the old log-prob of a tool's token -100, its ratio would overflow.
    """
    if "tool_mask" not in batch:
        return batch
    live_BT = live_mask(batch)
    return {**batch, **{name: batch[name] * live_BT for name in LOGPROBS if batch.get(name) is not None}}


def loss_options(settings: LossSettings) -> dict[str, Any]:
    """The loss's options as ``linear_grpo_loss`` names them."""
    names = (
        "loss_type", "epsilon_high", "delta", "sapo_temperatures", "beta", "kl_times_ratio",
    )  # fmt: skip
    return {"epsilon": settings.epsilon_low, **{name: getattr(settings, name) for name in names}}


def one_pass_loss(
    model: torch.nn.Module,
    batch: dict[str, Any],
    weights_B: torch.Tensor,
    settings: LossSettings,
    accumulation: float,
    autocast: Any,
    *,
    shared: bool = False,
) -> OnePass:
    """TRL's ``_compute_loss`` for losses that are sums over single tokens.

    ``weights_B``: of a token of each sequence, ``token_weights.py``. ``accumulation``: micro-batches of this optimizer
    step, 1 in evaluation. ``autocast``: a context. ``shared``: each prompt runs once (``shared_prompts.py``).
    """
    mask_BT = live_mask(batch)
    sequence_N = mask_BT.nonzero()[:, 0]
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    labels = input_ids.new_full(input_ids.shape, -100)
    completion_labels = labels[:, -mask_BT.shape[1] :]
    completion_labels[mask_BT] = batch["completion_ids"][mask_BT]

    policy_scale_N = None
    if settings.importance_correction:
        policy_scale_N = batch["importance_sampling_ratio"].expand(mask_BT.shape)[mask_BT].float()
    old_logprobs = batch.get("old_per_token_logps")
    grpo_inputs = {
        "sequence_N": sequence_N,
        "weights_B": weights_B / accumulation,
        **rewards_or_advantages(settings, batch, mask_BT),
        "old_logprobs_N": None if old_logprobs is None else old_logprobs[mask_BT],
        "ref_logprobs_N": batch["ref_per_token_logps"][mask_BT] if settings.beta != 0 else None,
        "policy_scale_N": policy_scale_N,
        **loss_options(settings),
        "entropy_coef": settings.entropy_coef / accumulation if settings.entropy_bonus else 0.0,
    }
    extra = {name: batch[name] for name in TOKEN_TYPES if batch.get(name) is not None}
    if settings.aux_loss:
        extra["output_router_logits"] = True
    if shared:
        extra["shared_prompt_width"] = batch["prompt_ids"].shape[1]
    with autocast:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            fused_lm_head=True,
            grpo_inputs=grpo_inputs,
            **extra,
        )
    loss = output.grpo_loss
    if settings.aux_loss:
        loss = loss + settings.aux_loss_coef * output.aux_loss / accumulation
    # TRL logs the policy loss before the division by the accumulation, but for losses over the global token count
    policy_loss = output.policy_loss * (1.0 if settings.loss_type in ("dapo", "cispo") else accumulation)
    return OnePass(
        loss=loss,
        statistics_BS=sequence_statistics(output, sequence_N, len(mask_BT), settings),
        policy_loss=policy_loss.detach(),
        aux_loss=None if output.aux_loss is None else output.aux_loss.detach(),
    )
