"""Old and reference log-probs, once rewards have told which sequences are used.

TRL makes them before the rewards, of every sequence, padded to the longest. Here its call gets zeros (``answer``), and
what the loss will use is filled in afterwards (``fill``), with the same parameters.

Shapes: B sequences of this process, T padded completion positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from trl_ext.config import Options
from trl_ext.loss.shared_prompts import SharedPrompts
from trl_ext.trl_surface import LossSettings, RunSettings, use_adapter

from .batch_rows import even_batches, read_rows, select

# (model, batch) -> log-probs (B, T), first of what TRL's method returns, without a gradient
Scorer = Callable[[torch.nn.Module, dict[str, Any]], tuple[Any, Any, Any]]

# what a subclass may compute of all log-probs
OWN_METHODS = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies")


def why_complete(options: Options, settings: LossSettings, own: str | None) -> str | None:
    """Why TRL's log-probs can't wait for the rewards, or None where they can. ``own``: of ``OWN_METHODS``."""
    if not options.skip_zero_advantage:
        return "skip_zero_advantage=False"
    if settings.importance_correction:
        return "vLLM's importance correction needs them at once"
    return own


def logprob_inputs(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What TRL's ``_get_per_token_logps_and_entropies`` takes: token ids and mask (B, S), completion positions T."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return input_ids, attention_mask, batch["completion_ids"].shape[1]


class DeferredLogprobs:
    """Between generation and rewards (``wait`` to ``ready``), log-probs that TRL asks for are zeros and are counted."""

    def __init__(self, run: RunSettings, score: Scorer) -> None:
        self.run, self.score = run, score
        self._waits = False
        self.due = 0  # calls that got zeros

    def begin(self) -> None:
        """A generation begins."""
        self._waits, self.due = False, 0

    def wait(self, allowed: bool) -> None:
        """From here to the rewards the calls for log-probs are TRL's for old and reference ones."""
        self._waits = allowed

    def ready(self) -> None:
        """Rewards are known, or the generation is over."""
        self._waits = False

    def answer(self, input_ids: torch.Tensor, width: int, options: Mapping[str, Any]) -> torch.Tensor | None:
        """(B, T) zeros to be filled in, or None where the call must be answered now."""
        if not self._waits or any(value is not None for name, value in options.items() if name != "batch_size"):
            return None
        self.due += 1
        return torch.zeros(len(input_ids), width, device=input_ids.device)

    def fill(
        self,
        output: dict[str, Any],
        used_B: torch.Tensor,
        policy: Any,
        reference: Any,
        *,
        trim: tuple[bool, bool],
        training: bool,
        share: Callable[..., list[torch.Tensor] | None],
        shared_prompts: SharedPrompts,
    ) -> None:
        """Puts the log-probs of the sequences that the loss will use into ``output``; those of others stay 0.

        ``used_B`` (B,) bool. ``reference``: TRL's ``ref_model``, None where it is the policy without its adapter. Every
        process makes as many passes as the one with the most sequences. ``share`` (rows, table, batches) gives batches
        in which prompts run once, or None; ``shared_prompts`` tells the models so.
        """
        batch_size = self.run.train_batch_size if training else self.run.eval_batch_size
        table = read_rows(output, used_B)
        needed = torch.tensor([-(-int(table.wanted_B.sum()) // batch_size)], device=used_B.device)
        n_batches = int(self.run.accelerator.gather(needed).max())
        if n_batches == 0:
            return
        indices = even_batches(table.wanted_B, table.length_B, n_batches)
        shared = share(output, table, indices)
        indices = indices if shared is None else shared
        batches = [select(output, index_B, table, trim, self.run.pad_to_multiple_of) for index_B in indices]
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if output.get(name) is None:
                continue
            values_BT, model, adapter = output[name], policy, nullcontext()
            if name == "ref_per_token_logps" and reference is not None:
                model = reference
            elif name == "ref_per_token_logps":
                unwrapped = self.run.accelerator.unwrap_model(policy)
                adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
            with adapter:
                for index_B, batch in zip(indices, batches, strict=True):
                    with shared_prompts.given(None if shared is None else batch["prompt_ids"].shape[1]):
                        logprobs_BT = self.score(model, batch)[0]
                    values_BT[index_B, : logprobs_BT.shape[1]] = logprobs_BT.to(values_BT)
