"""``PackedRowHead`` is the fused head for the packed rows of TRL's ``AsyncGRPOTrainer``.

TRL calls ``model(..., shift_labels=..., fused_lm_head=True)`` with one row, in which samples share their common
prefixes. A position that several samples share has several tokens of the loss, with an advantage each.

Shapes: S positions of the row, N tokens of the loss, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from .forward import FusedHead, HeadCall, LogProbsOutput, expert_loss, spread
from .settings import backbone


class PackedRowHead(FusedHead):
    """Computes log-probs of a packed row's labels, or with ``HeadCall.position_N`` also the loss and its gradients.

    The row that TRL passes on predicts ``shift_labels`` without a shift, where padded rows' labels are shifted.
    """

    labels_name = "shift_labels"

    def __call__(
        self, model: Any, args: Any, labels_1S: torch.Tensor, call: HeadCall, kwargs: dict[str, Any]
    ) -> LogProbsOutput:
        """Runs the backbone on ``args`` and ``kwargs``, and computes log-probs (1, S), and the loss if asked for."""
        kwargs["use_cache"] = False
        outputs = backbone(model)(*args, **kwargs)
        hidden, aux_loss = outputs.last_hidden_state, expert_loss(outputs, kwargs, self.settings)
        labels_1S = labels_1S.to(hidden.device)
        if call.loss_inputs is None or call.position_N is None:
            mask_1S = labels_1S != -100
            logprobs_N, entropies_N = self._log_probs(model, hidden[mask_1S], labels_1S[mask_1S], None)
            return LogProbsOutput(spread(logprobs_N, mask_1S), spread(entropies_N, mask_1S), aux_loss)
        position_N = call.position_N.to(hidden.device)
        found = self._loss(model, hidden[0, position_N], labels_1S[0, position_N], call.loss_inputs)
        place = (torch.zeros_like(position_N), position_N)
        logprobs_1S, entropies_1S = (
            values_N.new_zeros(labels_1S.shape).index_put(tuple(one.to(values_N.device) for one in place), values_N)
            for values_N in (found.logprobs, found.entropies)
        )
        return LogProbsOutput(logprobs_1S, entropies_1S, aux_loss, found.loss)
