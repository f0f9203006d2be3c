"""Old and reference log-probs, once rewards have told which sequences are used.

TRL makes them before the rewards, of every sequence, padded to the longest. Here its call gets zeros (the trainer's
``_get_per_token_logps_and_entropies``), and what the loss will use is filled in afterwards, with the same parameters.

Shapes: B sequences of this process, T padded completion positions.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from trl_ext.loss.token_weights import live_tokens

from .batch_rows import even_batches, row_lengths, select
from .skipping import what_runs

FILLED = ("old_per_token_logps", "ref_per_token_logps")


def why_complete(trainer: Any) -> str | None:
    """Why TRL's log-probs can't wait for the rewards, or None where they can."""
    from trl_ext.trainer import CurvatureGRPOTrainer

    if not trainer._skip_zero_advantage:
        return "skip_zero_advantage=False"
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        return "vLLM's importance correction needs them at once"
    for name in ("_generate_and_score_completions", "_get_per_token_logps_and_entropies"):
        if getattr(type(trainer), name) is not getattr(CurvatureGRPOTrainer, name):
            return f"{type(trainer).__name__} has a {name} of its own"
    return None


def logprobs_of_rows(trainer: Any, model: torch.nn.Module, batch: dict[str, Any], *, entropy: bool = False):
    """((B, T) log-probs, (B, T) entropies or None) of a batch's completions, without a gradient; tool output is 0."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    trainer._tool_mask_BT = batch.get("tool_mask")
    try:
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
            logprobs_BT, entropies_BT, _ = trainer._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, batch["completion_ids"].shape[1], compute_entropy=entropy
            )
    finally:
        trainer._tool_mask_BT = None
    return logprobs_BT, entropies_BT


def fill_logprobs(trainer: Any, output: dict[str, Any], batch_size: int, *, training: bool) -> None:
    """Puts the log-probs of the sequences that the loss will use into ``output``; those of others stay 0.

    Every process makes as many passes as the one with the most sequences.
    """
    tokens_B = live_tokens(output)
    used_B = torch.ones_like(tokens_B, dtype=torch.bool)
    if training and what_runs(trainer, output).skipped:
        used_B = (output["advantages"] != 0) & (tokens_B > 0)
    needed = torch.tensor([-(-int(used_B.sum()) // batch_size)], device=used_B.device)
    n_batches = int(trainer.accelerator.gather(needed).max())
    if n_batches == 0:
        return
    indices = even_batches(used_B, row_lengths(output), n_batches)
    trim = trainer._micro_batches.trim
    batches = [select(output, index_B, trim, trainer.pad_to_multiple_of) for index_B in indices]
    for name in FILLED:
        if output.get(name) is None:
            continue
        values_BT = output[name]
        model, adapter = _whose(trainer, name)
        with adapter:
            for index_B, batch in zip(indices, batches, strict=True):
                logprobs_BT = logprobs_of_rows(trainer, model, batch)[0]
                values_BT[index_B, : logprobs_BT.shape[1]] = logprobs_BT.to(values_BT)


def _whose(trainer: Any, name: str):
    """The model that gives these log-probs, and the adapter it gives them with, as TRL chooses them."""
    if name == "old_per_token_logps":
        return trainer.model, nullcontext()
    if trainer.ref_model is not None:
        return trainer.ref_model, nullcontext()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return trainer.model, use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
