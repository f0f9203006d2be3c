"""What TRL logs of its micro-batches, of sequences that ran in others or not at all.

Shapes: B sequences that were planned together, on this process, in TRL's order; S statistics of a sequence, as in
``fused_loss.STATISTICS``.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.loss.fused_loss import STATISTICS, log_micro_batch

TOKENS, ENTROPY = STATISTICS.index("tokens"), STATISTICS.index("entropy")


class StepStatistics:
    """A table of B rows; what isn't run has its tokens in it, and nothing of it is clipped.

    ``live_B``: the sequences whose statistics will be recorded. ``skipping``: the others are left out, so that
    ``entropy`` is known with ``full_entropy`` alone.
    """

    def __init__(
        self, trainer: Any, tokens_B: torch.Tensor, live_B: torch.Tensor, *, n_parts: int, skipping: bool
    ) -> None:
        self.trainer, self.n_parts, self.skipping, self.live_B = trainer, n_parts, skipping, live_B
        self.table_BS = torch.zeros(len(tokens_B), len(STATISTICS), device=tokens_B.device)
        self.table_BS[:, TOKENS] = tokens_B.float()

    def set_entropy(self, row_B: torch.Tensor, entropy_B: torch.Tensor) -> None:
        """Sums over the tokens of sequences that don't run."""
        self.table_BS[row_B, ENTROPY] = entropy_B.to(self.table_BS)

    def record(self, row_B: torch.Tensor, statistics_BS: torch.Tensor) -> None:
        """What ``fused_loss.sequence_statistics`` found of a micro-batch of these rows; of live ones alone."""
        live_B = self.live_B[row_B]
        self.table_BS[row_B[live_B]] = statistics_BS[live_B].to(self.table_BS)

    def log(self) -> tuple[float, float]:
        """TRL's metrics of each of its micro-batches, over all processes. Returns the sum of the live sequences'
        entropies over tokens, and how many tokens they have."""
        live_B1 = self.live_B.to(self.table_BS)[:, None]
        local = torch.cat([self.table_BS, live_B1], dim=1).unflatten(0, (self.n_parts, -1))
        parts = self.trainer.accelerator.gather(local[None]).transpose(0, 1).flatten(1, 2).cpu()
        for part in parts:
            log_micro_batch(
                self.trainer, "train", part[:, :-1], entropy=not self.skipping or self.trainer._full_entropy
            )
        live = parts[..., -1]
        return (parts[..., ENTROPY] * live).sum().item(), (parts[..., TOKENS] * live).sum().item()
