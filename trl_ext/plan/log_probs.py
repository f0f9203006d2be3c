"""Old and reference log-probs, once rewards have shown which sequences the loss will use.

TRL makes them before the rewards, of every sequence, padded to the longest. ``rollout.py`` answers that call with zeros
where they can wait; here those that are used are made afterwards, with the same parameters.

Shapes: B sequences of this rank, T padded completion positions, C columns of prompt and completion.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from trl_ext.compat import LossSettings, RunSettings, disable_gradient_checkpointing, use_adapter
from trl_ext.head.forward import HeadCall
from trl_ext.objective.fused import completion_labels
from trl_ext.options import CurvatureOptions
from trl_ext.schema import OLD, POSTPONED, Batch, Sequences

from .micro_batches import MicroBatches
from .rows import read_rows

# what a subclass may compute of all log-probs
OWN_METHODS = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies")


def why_complete(options: CurvatureOptions, settings: LossSettings, own: str | None) -> str | None:
    """Why TRL's log-probs can't wait for the rewards, or None where they can. ``own``: what a subclass has of
    ``OWN_METHODS``, or another reason."""
    if not options.fused_loss:
        return "fused_loss=False"
    if not options.skip_zero_advantage:
        return "skip_zero_advantage=False"
    if settings.importance_correction:
        return "vLLM's importance correction needs them at once"
    return own


def score(model: torch.nn.Module, batch: Sequences, autocast: Any, *, shared: bool) -> torch.Tensor:
    """(B, T) log-probs of the completions' tokens, 0 at padding; no gradient. ``shared``: each prompt runs once."""
    input_ids_BC = batch.input_ids
    with torch.no_grad(), autocast:
        output = model(
            input_ids=input_ids_BC,
            attention_mask=batch.attention_mask,
            labels=completion_labels(input_ids_BC, batch.completion_mask.bool()),
            fused_lm_head=True,
            head_call=HeadCall(prompt_width=batch.prompt_width if shared else None),
        )
    return output.log_probs[:, -batch.width :]


class UsedLogProbs:
    """Makes the log-probs of the sequences that the loss will use.

    ``reference``: TRL's ``ref_model``, None where it is the policy without its adapter. ``checkpointing``: TRL's
    ``gradient_checkpointing_kwargs``.
    """

    def __init__(self, run: RunSettings, micro_batches: MicroBatches, reference: Any, checkpointing: Any) -> None:
        self.run, self.micro_batches = run, micro_batches
        self.reference, self.checkpointing = reference, checkpointing

    def columns(self, batch: Sequences, used_B: torch.Tensor, policy: Any, *, training: bool) -> Batch:
        """The (B, T) columns that TRL left as zeros, by name; sequences that aren't used stay 0.

        ``used_B`` (B,) bool. Every rank makes as many passes as the one with the most sequences.
        """
        batch_size = self.run.train_batch_size if training else self.run.eval_batch_size
        table = read_rows(batch, used_B)
        plan = self.micro_batches.plan_scoring(table, batch_size)
        parts = [self.micro_batches.limits.trimming.select(batch, row_B, table) for row_B in plan.batches]
        columns = {name: batch.columns[name].clone() for name in POSTPONED if batch.columns.get(name) is not None}
        with disable_gradient_checkpointing(policy, self.checkpointing):
            for name, values_BT in columns.items():
                model, adapter = self._model(name, policy)
                with adapter:
                    for row_B, part in zip(plan.batches, parts, strict=True):
                        logprobs_BT = score(model, part, self.run.accelerator.autocast(), shared=plan.shared)
                        values_BT[row_B, : logprobs_BT.shape[1]] = logprobs_BT.to(values_BT)
        return columns

    def _model(self, name: str, policy: Any) -> tuple[Any, Any]:
        """The model whose log-probs these are, and the context that gives it the right adapter."""
        if name == OLD:
            return policy, nullcontext()
        if self.reference is not None:
            return self.reference, nullcontext()
        unwrapped = self.run.accelerator.unwrap_model(policy)
        return policy, use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
