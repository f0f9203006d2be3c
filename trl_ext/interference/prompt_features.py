"""What the policy makes of each prompt: the mean of its tokens' hidden states before the LM head.

arXiv 2601.23135, section 4.1, explains near-orthogonal gradients by near-orthogonal features of the prompts.

Shapes: B sequences of a micro-batch, T prompt positions, H hidden, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model


def mean_by_prompt(feature_BH: torch.Tensor, prompt_B: torch.Tensor) -> torch.Tensor:
    """(P, H): the mean over the sequences of each prompt, in ascending order of ``prompt_B``.

    Sequences that weren't run have NaN features, and prompts that have no other are left out.
    """
    seen_B = ~feature_BH.isnan().any(dim=1)
    feature_BH, prompt_B = feature_BH[seen_B], prompt_B[seen_B]
    prompt_P, row_B, count_P = prompt_B.unique(return_inverse=True, return_counts=True)
    total_PH = feature_BH.new_zeros(len(prompt_P), feature_BH.shape[1]).index_add_(0, row_B, feature_BH)
    return total_PH / count_P[:, None]


class PromptFeatures:
    """A forward hook on the model's backbone, which looks only between ``set_rows`` and ``end_rows``.

    The micro-batch's rows begin with their prompts, as TRL makes them. A backbone whose output has no
    ``last_hidden_state``, or other rows, gives no features. What fails is handed to ``on_error``.
    """

    def __init__(self, model: Any, on_error: Callable[[Exception], None]) -> None:
        base = model.get_base_model() if is_peft_model(model) else model
        self._on_error = on_error
        self._prompt_mask_BT: torch.Tensor | None = None
        self._feature_BH: torch.Tensor | None = None
        self._handle = base.base_model.register_forward_hook(self._hook)

    def close(self) -> None:
        """Takes the hook off."""
        self._handle.remove()

    def set_rows(self, prompt_mask_BT: torch.Tensor) -> None:
        """The next forward is of these rows; the mask is 1 on the prompts' tokens, 0 on padding."""
        self._prompt_mask_BT, self._feature_BH = prompt_mask_BT, None

    def end_rows(self) -> torch.Tensor | None:
        """(B, H) float32, or None where nothing was seen."""
        self._prompt_mask_BT = None
        feature_BH, self._feature_BH = self._feature_BH, None
        return feature_BH

    def _hook(self, module, inputs, output):
        if self._prompt_mask_BT is None or not torch.is_grad_enabled():
            return
        try:
            self._look(getattr(output, "last_hidden_state", None), self._prompt_mask_BT)
        except Exception as error:
            self._on_error(error)

    def _look(self, hidden: torch.Tensor | None, mask_BT: torch.Tensor) -> None:
        if hidden is None or len(hidden) != len(mask_BT) or hidden.shape[1] < mask_BT.shape[1]:
            return
        weight_BT1 = mask_BT.to(hidden.device, torch.float32)[:, :, None]
        hidden_BTH = hidden.detach()[:, : mask_BT.shape[1]].float()
        self._feature_BH = (hidden_BTH * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
