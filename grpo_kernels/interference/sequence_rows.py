"""The rows of one micro-batch as sequences: sums over each sequence's own tokens.

Shapes: S sequences of a micro-batch, R rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class SequenceRows:
    """The sequences of one micro-batch, and what was seen of them."""

    prompt_S: torch.Tensor
    sequence_RT: torch.Tensor | None  # the sequence of each position, -1 for none; None: each row is one
    n_rows: int
    total: dict[Any, torch.Tensor] = field(default_factory=dict)  # key None: the (S, parts, slots) sketch

    def add(self, key: Any, values_S: torch.Tensor) -> None:
        values_S = values_S.to(torch.promote_types(values_S.dtype, torch.float32))
        if key in self.total:
            self.total[key] += values_S.to(self.total[key].device)
        else:
            self.total[key] = values_S.clone()

    def tokens(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """(R, tokens of a row, width) of what a layer got or gave, also where it flattened its rows."""
        width = values.shape[-1]
        if values.ndim >= 3 and values.shape[0] == self.n_rows:
            return values.reshape(self.n_rows, -1, width)
        if values.ndim == 2 and values.shape[0] % self.n_rows == 0:
            return values.reshape(self.n_rows, -1, width)
        raise ValueError(
            f"layer {name!r} saw a tensor {tuple(values.shape)}, which {self.n_rows} rows don't fit: "
            "prompt ids of the wrong length, or a layer that regroups tokens"
        )

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """(S, width of left, width of right): each sequence's sum over its tokens of left right^T."""
        left, right = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (left, right))
        if self.sequence_RT is None:
            return torch.bmm(left.transpose(1, 2), right)
        flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1)
        places = [(self._per_token(left) == s).nonzero().squeeze(1) for s in range(len(self.prompt_S))]
        return torch.stack([flat_left[i].T @ flat_right[i] for i in places])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(S, width): each sequence's sum over its tokens."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.sequence_RT is None:
            return values.sum(1)
        sequence_N = self._per_token(values)
        total = values.new_zeros(len(self.prompt_S), values.shape[-1])
        live = sequence_N >= 0
        return total.index_add_(0, sequence_N[live], values.flatten(0, 1)[live])

    def _per_token(self, values: torch.Tensor) -> torch.Tensor:
        """The sequence of each of a layer's tokens, which may be several a position (attention heads)."""
        assert self.sequence_RT is not None
        times = values.shape[1] // self.sequence_RT.shape[1]
        return self.sequence_RT.to(values.device).repeat_interleave(times, dim=1).flatten()
