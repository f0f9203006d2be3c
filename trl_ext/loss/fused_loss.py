"""The loss in one pass inside the model's forward, and the metrics TRL logs of it.

Shapes: B sequences of a micro-batch, T completion positions, N live tokens, in the order of the (B, T) mask.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_kernels import METHODS
from grpo_kernels.head.loss_checks import check_loss_options
from grpo_kernels.head.token_losses import SURROGATES

from .token_weights import micro_batch_token_weights, token_weights

STATISTICS = ("tokens", "entropy", "kl", "low", "high")  # of a sequence: sums over its tokens
CLIPPED = tuple(name for name, surrogate in SURROGATES.items() if surrogate == "clip")


def why_not_one_pass(trainer: Any, inputs: dict[str, Any]) -> str | None:
    """What of this micro-batch's loss isn't a sum over single tokens (TRL then computes it on our head), or None."""
    if trainer.loss_type not in SURROGATES:
        return f"loss_type={trainer.loss_type!r} weighs whole sequences"
    if trainer.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile} depends on the entropies of all tokens"
    if trainer.off_policy_mask_threshold is not None:
        return f"off_policy_mask_threshold={trainer.off_policy_mask_threshold} masks whole sequences"
    if trainer.use_adaptive_entropy:
        return "use_adaptive_entropy steers the entropy bonus by its own count"
    if trainer.importance_sampling_level != "token":
        if inputs.get("old_per_token_logps") is not None:
            return "importance_sampling_level='sequence' off policy"
        if trainer.beta != 0 and trainer.args.use_bias_correction_kl:
            return "importance_sampling_level='sequence' with KL times the ratio"
    if any(inputs.get(name) is not None for name in ("pixel_values", "image_grid_thw", "num_images")):
        return "images travel with the rows"
    try:
        check_loss_options(**loss_options(trainer))
    except ValueError as error:  # what TRL computes with, and we refuse
        return str(error)
    return None


def live_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """(B, T) bool: completion tokens the loss counts, neither padding nor tool output."""
    mask_BT = inputs["completion_mask"]
    return (mask_BT if "tool_mask" not in inputs else mask_BT * inputs["tool_mask"]).bool()


def rewards_or_advantages(trainer: Any, inputs: dict[str, Any], mask_BT: torch.Tensor) -> dict[str, Any]:
    """The kernel normalises the group's rewards itself where the method needs nothing else of the batch."""
    method, options = trainer._normalization, trainer._normalization_options
    made, advantages = inputs.get("made_advantages"), inputs["advantages"]
    own = made is not None and made.shape == advantages.shape and torch.equal(made, advantages)  # not a subclass's
    summed = trainer.multi_objective_aggregation == "sum_then_normalize"
    alone = isinstance(method, str) and METHODS[method].own_group
    if own and summed and alone and "group_rewards" in inputs:
        return {
            "advantages": None,
            "rewards": (inputs["group_rewards"], inputs["group_position"]),
            "normalization": (method, options),
        }
    if advantages.dim() == 2:  # of a subclass: one for each token
        return {"advantages": None, "advantages_N": advantages.expand(mask_BT.shape)[mask_BT]}
    return {"advantages": advantages}


def loss_options(trainer: Any) -> dict[str, Any]:
    """The loss's options as ``linear_grpo_loss`` names them."""
    return {
        "loss_type": trainer.loss_type,
        "epsilon": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high,
        "delta": trainer.args.delta,
        "sapo_temperatures": (trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg),
        "beta": trainer.beta,
        "kl_times_ratio": trainer.args.use_bias_correction_kl,
    }


def token_weights_now(trainer: Any, mode: str, inputs: dict[str, Any], mask_BT: torch.Tensor) -> torch.Tensor:
    """(B,), from the mask as it is now: a subclass may have changed it since the batch was made."""
    lengths_B = mask_BT.sum(dim=1)
    weights_B = token_weights(
        lengths_B,
        trainer.loss_type,
        micro_batch_size=len(mask_BT),
        max_completion_length=trainer.max_completion_length,
        num_items_in_batch=inputs["num_items_in_batch"],
        num_processes=trainer.accelerator.num_processes,
        steps_per_generation=trainer.args.steps_per_generation if mode == "train" else 1,
    )
    return micro_batch_token_weights(lengths_B) if weights_B is None else weights_B


def one_pass_loss(trainer: Any, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The micro-batch's loss, 0-d: TRL's ``_compute_loss`` for losses that are sums over single tokens."""
    mode = "train" if trainer.model.training else "eval"
    accumulation = trainer.current_gradient_accumulation_steps if mode == "train" else 1.0
    mask_BT = live_mask(inputs)
    sequence_N = mask_BT.nonzero()[:, 0]
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    labels = input_ids.new_full(input_ids.shape, -100)
    completion_labels = labels[:, -mask_BT.shape[1] :]
    completion_labels[mask_BT] = inputs["completion_ids"][mask_BT]

    policy_scale_N = None
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        policy_scale_N = inputs["importance_sampling_ratio"].expand(mask_BT.shape)[mask_BT].float()
    old_logprobs = inputs.get("old_per_token_logps")
    # regrouped sequences keep the weights they have in TRL's own micro-batches
    weights_B = inputs["token_weight"] if "row" in inputs else token_weights_now(trainer, mode, inputs, mask_BT)
    bonus = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    grpo_inputs = {
        "sequence_N": sequence_N,
        "weights_B": weights_B / accumulation,
        **rewards_or_advantages(trainer, inputs, mask_BT),
        "old_logprobs_N": None if old_logprobs is None else old_logprobs[mask_BT],
        "ref_logprobs_N": inputs["ref_per_token_logps"][mask_BT] if trainer.beta != 0 else None,
        "policy_scale_N": policy_scale_N,
        **loss_options(trainer),
        "entropy_coef": bonus / accumulation,
    }
    extra = {name: inputs[name] for name in ("token_type_ids", "mm_token_type_ids") if inputs.get(name) is not None}
    if trainer.aux_loss_enabled:
        extra["output_router_logits"] = True
    with trainer.accelerator.autocast():
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            fused_lm_head=True,
            grpo_inputs=grpo_inputs,
            **extra,
        )
    loss = output.loss
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * output.aux_loss / accumulation
    statistics_BS = sequence_statistics(
        output,
        sequence_N,
        len(mask_BT),
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=trainer.args.delta,
        loss_type=trainer.loss_type,
    )
    if "row" in inputs:
        trainer._micro_batches.record(inputs["row"], statistics_BS, last="skipped" in inputs)
    else:
        # TRL logs the policy loss before the division by the accumulation, but for losses over the global token count
        policy_loss = output.policy_loss * (1.0 if trainer.loss_type in ("dapo", "cispo") else accumulation)
        log_loss_metrics(trainer, mode, statistics_BS, policy_loss, output.aux_loss)
    return loss


def sequence_statistics(
    output: Any,
    sequence_N: torch.Tensor,
    n_sequences: int,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    loss_type: str,
) -> torch.Tensor:
    """Sums over each sequence's tokens, (B, S) float32, in the order of ``STATISTICS``.

    ``low`` and ``high`` count tokens whose ratio left the clip range on the side where that stops the gradient.
    """
    ratio, advantages = output.ratio, output.advantages
    if delta is not None and loss_type in CLIPPED:
        ratio = ratio.clamp(max=delta)
    high_bound = epsilon_high if loss_type == "cispo" else 1 + epsilon_high
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > high_bound) & (advantages > 0)
    kl = torch.zeros_like(ratio) if output.kl is None else output.kl
    of_tokens = [torch.ones_like(ratio), output.entropies, kl, low, high]
    values_NS = torch.stack([value.float() for value in of_tokens], dim=1)
    return values_NS.new_zeros(n_sequences, len(of_tokens)).index_add_(0, sequence_N.to(values_NS.device), values_NS)


def log_loss_metrics(trainer: Any, mode: str, statistics_BS: torch.Tensor, policy_loss, aux_loss) -> None:
    """All that TRL logs of a micro-batch's loss, over all processes, in one gather and one wait for the device."""
    scalars = [
        torch.zeros((), device=statistics_BS.device) if x is None else x.detach() for x in (policy_loss, aux_loss)
    ]
    of_process = torch.stack([x.to(statistics_BS) for x in scalars]).expand(len(statistics_BS), 2)
    gathered = trainer.accelerator.gather(torch.cat([statistics_BS, of_process], dim=1)).cpu()
    metrics = trainer._metrics[mode]
    if trainer._entropy_bonus_enabled:
        metrics["policy_loss"].append(gathered[:, -2].mean().item())
        if mode == "train" and trainer.accelerator.sync_gradients:
            metrics["entropy_coef"].append(trainer.entropy_coef)
    if trainer.aux_loss_enabled:
        metrics["aux_loss"].append(gathered[:, -1].mean().item())
    log_micro_batch(trainer, mode, gathered[:, :-2])


def log_micro_batch(trainer: Any, mode: str, table_BS: torch.Tensor, *, entropy: bool = True) -> None:
    """TRL's means over tokens, and extremes over sequences, of one micro-batch of all processes: (B, S), on the CPU."""
    metrics = trainer._metrics[mode]
    table = dict(zip(STATISTICS, table_BS.double().unbind(1), strict=True))

    def mean_over_tokens(name: str) -> float:
        return (table[name].sum() / table["tokens"].sum().clamp(min=1)).item()

    def over_sequences(name: str) -> torch.Tensor:
        share_B = table[name] / table["tokens"]
        share_B = share_B[~share_B.isnan()]  # a sequence without tokens
        return share_B if len(share_B) else torch.tensor([torch.nan])

    if trainer.beta != 0:
        metrics["kl"].append(mean_over_tokens("kl"))
    if entropy:
        metrics["entropy"].append(mean_over_tokens("entropy"))
    if trainer.loss_type in CLIPPED:
        metrics["clip_ratio/low_mean"].append(mean_over_tokens("low"))
        metrics["clip_ratio/high_mean"].append(mean_over_tokens("high"))
        metrics["clip_ratio/region_mean"].append(mean_over_tokens("low") + mean_over_tokens("high"))
        metrics["clip_ratio/low_min"].append(over_sequences("low").min().item())
        metrics["clip_ratio/high_max"].append(over_sequences("high").max().item())
    elif trainer.loss_type == "cispo":
        metrics["cispo_clip_ratio"].append(mean_over_tokens("high"))
