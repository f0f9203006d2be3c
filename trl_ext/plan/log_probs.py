"""Computes old and reference log-probs of the sequences that the loss will use, once rewards are known.

TRL computes them before the rewards, for every sequence, padded to the longest. If they can be postponed,
``rollout.py`` returns zeros to TRL's call, and this file computes the needed ones afterwards, with the same parameters.

Shapes: B sequences of this rank, T padded completion positions, C columns of prompt and completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from trl_ext.compat import LossSettings, RunSettings
from trl_ext.head.forward import HeadCall
from trl_ext.objective.fused import completion_labels
from trl_ext.options import CurvatureOptions
from trl_ext.schema import OLD, POSTPONED, Batch, Sequences

from .micro_batches import MicroBatches
from .rows import read_rows

# methods in which a subclass may use the log-probs of all sequences
OWN_METHODS = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies")


def why_not_postponed(options: CurvatureOptions, settings: LossSettings, obstacle: str | None) -> str | None:
    """Returns why the log-probs can't be postponed until rewards are known, or None if they can.

    ``obstacle``: the override of a method of ``OWN_METHODS``, or another reason; None if there is none.
    """
    if not options.fused_loss:
        return "fused_loss=False"
    if not options.skip_zero_advantage:
        return "skip_zero_advantage=False"
    if settings.importance_correction:
        return "vLLM's importance correction needs them before the rewards"
    return obstacle


def score(model: torch.nn.Module, batch: Sequences, autocast: Any, *, shared: bool) -> torch.Tensor:
    """Returns log-probs (B, T) of the completions, 0 at padding, no gradient. ``shared``: each prompt runs once."""
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
    """Computes the log-probs of the sequences that the loss will use.

    ``reference`` is TRL's ``ref_model``, or None if the reference is the policy without its adapter. ``checkpointing``
    is TRL's ``gradient_checkpointing_kwargs``.
    """

    def __init__(self, run: RunSettings, micro_batches: MicroBatches, reference: Any, checkpointing: Any) -> None:
        self.run, self.micro_batches = run, micro_batches
        self.reference, self.checkpointing = reference, checkpointing

    def columns(self, batch: Sequences, used_B: torch.Tensor, policy: Any, *, training: bool) -> Batch:
        """Returns the postponed columns (B, T) by name; rows where ``used_B`` (B,) is False stay 0.

        Every rank runs as many forward passes as the rank with the most sequences.
        """
        batch_size = self.run.train_batch_size if training else self.run.eval_batch_size
        table = read_rows(batch, used_B)
        plan = self.micro_batches.plan_scoring(table, batch_size)
        parts = [self.micro_batches.limits.trimming.select(batch, row_B, table) for row_B in plan.batches]
        columns = {name: batch.columns[name].clone() for name in POSTPONED if batch.columns.get(name) is not None}
        with without_checkpointing(policy, self.checkpointing):
            for name, values_BT in columns.items():
                model, adapter = self._model(name, policy)
                with adapter:
                    for row_B, part in zip(plan.batches, parts, strict=True):
                        logprobs_BT = score(model, part, self.run.accelerator.autocast(), shared=plan.shared)
                        values_BT[row_B, : logprobs_BT.shape[1]] = logprobs_BT.to(values_BT)
        return columns

    def _model(self, name: str, policy: Any) -> tuple[Any, Any]:
        """Returns the model that computes the column ``name``, and the context that selects its adapter."""
        if name == OLD:
            return policy, nullcontext()
        if self.reference is not None:
            return self.reference, nullcontext()
        unwrapped = self.run.accelerator.unwrap_model(policy)
        return policy, reference_adapter(unwrapped)


@contextmanager
def without_checkpointing(model: Any, options: Any) -> Iterator[None]:
    """Turns gradient checkpointing off, and on again with TRL's ``gradient_checkpointing_kwargs``."""
    if not model.is_gradient_checkpointing:
        yield
        return
    model.gradient_checkpointing_disable()
    try:
        yield
    finally:
        model.gradient_checkpointing_enable(options)


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """Makes a PEFT model the reference: with its adapter "ref" if it has one, as TRL names it, else without any."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    before = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(before)
