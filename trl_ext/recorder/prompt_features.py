"""Records each prompt's feature: the mean of its tokens' last hidden states.

arXiv 2601.23135, section 4.1, explains near-orthogonal gradients by near-orthogonal features of the prompts.

Shapes: B sequences of a micro-batch, T prompt positions, H hidden, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model


class PromptFeatures:
    """Sums the features of a step's sequences by prompt, with a hook on the backbone from ``set_rows`` to ``end_rows``.

    Each row must begin with its prompt, as TRL's do. If the backbone returns no ``last_hidden_state``, or other rows,
    the step has no features. An exception is passed to ``on_error``.
    """

    def __init__(self, model: Any, on_error: Callable[[Exception], None]) -> None:
        base = model.get_base_model() if is_peft_model(model) else model
        self._backbone, self._on_error = base.base_model, on_error
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None  # prompt_mask_BT, prompt_B
        self._feature_BH: torch.Tensor | None = None
        self._totals_PH: torch.Tensor | None = None
        self._missed = False  # some rows of this step have no features
        self._handle: Any = None

    def close(self) -> None:
        """Removes the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def set_rows(self, prompt_mask_BT: torch.Tensor, prompt_B: torch.Tensor) -> None:
        """Assigns the next forward to these rows; ``prompt_B`` numbers their prompts from 0."""
        self.close()
        self._handle = self._backbone.register_forward_hook(self._hook)
        self._rows, self._feature_BH = (prompt_mask_BT, prompt_B), None

    def end_rows(self) -> None:
        """Adds the rows' features to the sums, and removes the hook."""
        self.close()
        rows, feature_BH = self._rows, self._feature_BH
        self._rows = self._feature_BH = None
        if rows is None:
            return
        if feature_BH is None:
            self._missed = True
            return
        counted_BH = torch.nn.functional.pad(feature_BH, (0, 1), value=1.0)
        prompt_B = rows[1].to(counted_BH.device)
        new_PH = counted_BH.new_zeros(int(prompt_B.max()) + 1, counted_BH.shape[1])
        if self._totals_PH is not None:
            missing = max(0, len(new_PH) - len(self._totals_PH))
            new_PH = torch.nn.functional.pad(self._totals_PH, (0, 0, 0, missing))
        self._totals_PH = new_PH.index_add_(0, prompt_B, counted_BH)

    def take(self) -> torch.Tensor | None:
        """Ends the step, and returns (P, H + 1) float32: each prompt's sum of features and number of sequences.

        None if some rows have no features.
        """
        totals_PH = None if self._missed else self._totals_PH
        self.forget()
        return totals_PH

    def forget(self) -> None:
        """Ends the step and drops its sums."""
        self.close()
        self._rows = self._feature_BH = self._totals_PH = None
        self._missed = False

    def _hook(self, module, inputs, output):
        if self._rows is None or not torch.is_grad_enabled():
            return
        try:
            self._record(getattr(output, "last_hidden_state", None), self._rows[0])
        except Exception as error:
            self._on_error(error)

    def _record(self, hidden: torch.Tensor | None, mask_BT: torch.Tensor) -> None:
        if hidden is None or len(hidden) != len(mask_BT) or hidden.shape[1] < mask_BT.shape[1]:
            return
        weight_BT1 = mask_BT.to(hidden.device, torch.float32)[:, :, None]
        hidden_BTH = hidden.detach()[:, : mask_BT.shape[1]].float()
        self._feature_BH = (hidden_BTH * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
