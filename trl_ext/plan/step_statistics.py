"""What TRL logs of its micro-batches, of sequences that ran in others or not at all.

Shapes: B sequences that were planned together, on this process, in TRL's order; S statistics of a sequence, as in
``loss/statistics.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.compat import LossSettings
from trl_ext.objective.statistics import STATISTICS, micro_batch_metrics

TOKENS, ENTROPY = STATISTICS.index("tokens"), STATISTICS.index("entropy")


class StepStatistics:
    """A table of B rows; what isn't run has its tokens in it, and nothing of it is clipped.

    ``live_B``: the sequences whose statistics will be recorded. ``entropy``: whether every sequence runs, so
    that the entropy of all will be known.
    """

    def __init__(
        self, settings: LossSettings, tokens_B: torch.Tensor, live_B: torch.Tensor, *, n_parts: int, entropy: bool
    ) -> None:
        self.settings, self.n_parts, self.entropy, self.live_B = settings, n_parts, entropy, live_B
        self.table_BS = torch.zeros(len(tokens_B), len(STATISTICS), device=tokens_B.device)
        self.table_BS[:, TOKENS] = tokens_B.float()

    def record(self, row_B: torch.Tensor, statistics_BS: torch.Tensor) -> None:
        """What ``sequence_statistics`` found of a micro-batch of these rows; of live ones alone."""
        live_B = self.live_B[row_B]
        self.table_BS[row_B[live_B]] = statistics_BS[live_B].to(self.table_BS)

    def gather(self, accelerator: Any) -> tuple[list[dict[str, float]], float, float]:
        """TRL's metrics of each of its micro-batches, over all processes; the sum of the live sequences' entropies over
        tokens, and how many tokens they have."""
        live_B1 = self.live_B.to(self.table_BS)[:, None]
        local = torch.cat([self.table_BS, live_B1], dim=1).unflatten(0, (self.n_parts, -1))
        parts = accelerator.gather(local[None]).transpose(0, 1).flatten(1, 2).cpu()
        live = parts[..., -1]
        metrics = [micro_batch_metrics(part[:, :-1], self.settings, entropy=self.entropy) for part in parts]
        return metrics, (parts[..., ENTROPY] * live).sum().item(), (parts[..., TOKENS] * live).sum().item()
