"""Collects the statistics of regrouped sequences, and computes TRL's metrics of TRL's own micro-batches from them.

Shapes: B sequences of this rank that were planned together, in TRL's order; S statistics of a sequence, as in
``objective/statistics.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.compat import LossSettings
from trl_ext.objective.statistics import STATISTICS, micro_batch_metrics

TOKENS, ENTROPY = STATISTICS.index("tokens"), STATISTICS.index("entropy")


class StepStatistics:
    """A table (B, S) of statistics. A sequence that doesn't run has only its number of tokens in it.

    Args:
        live_B: (B,) bool, the sequences whose statistics will be recorded.
        n_parts: number of TRL's micro-batches.
        entropy: whether every sequence runs, so that the mean entropy can be logged.
    """

    def __init__(
        self, settings: LossSettings, tokens_B: torch.Tensor, live_B: torch.Tensor, *, n_parts: int, entropy: bool
    ) -> None:
        self.settings, self.n_parts, self.entropy, self.live_B = settings, n_parts, entropy, live_B
        self.gathered = False
        self.table_BS = torch.zeros(len(tokens_B), len(STATISTICS), device=tokens_B.device)
        self.table_BS[:, TOKENS] = tokens_B.float()

    def record(self, row_B: torch.Tensor, statistics_BS: torch.Tensor) -> None:
        """Stores the statistics of the live rows of a micro-batch. ``row_B``: the table's rows that ran in it."""
        live_B = self.live_B[row_B]
        self.table_BS[row_B[live_B]] = statistics_BS[live_B].to(self.table_BS)

    def gather(self, accelerator: Any) -> tuple[list[dict[str, float]], float, float]:
        """Gathers the table of all ranks.

        Returns:
            TRL's metrics of each of its micro-batches, the sum of the live tokens' entropies, and their number.
        """
        self.gathered = True
        live_B1 = self.live_B.to(self.table_BS)[:, None]
        local = torch.cat([self.table_BS, live_B1], dim=1).unflatten(0, (self.n_parts, -1))
        parts = accelerator.gather(local[None]).transpose(0, 1).flatten(1, 2).cpu()
        live = parts[..., -1]
        metrics = [micro_batch_metrics(part[:, :-1], self.settings, entropy=self.entropy) for part in parts]
        return metrics, (parts[..., ENTROPY] * live).sum().item(), (parts[..., TOKENS] * live).sum().item()
