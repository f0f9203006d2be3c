"""``SequenceRows`` sums a layer's tensors over each sequence's tokens in one micro-batch.

Shapes: S sequences of a micro-batch, R rows, T positions, N = R T tokens, M replicates of a sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class SequenceRows:
    """The sequences of one micro-batch, and their sums so far. No method waits for the GPU.

    Attributes:
        prompt_S: (S,) integers, the prompt of each sequence.
        sequence_RT: (R, T) integers, the sequence of each position, -1 for none; None: row i is sequence i.
        n_rows: R.
        checked: whether these rows contribute to the step's gradient.
        total: sums by key: (S, M, slots) by section, or (S, ...) by parameter if nothing is projected.
        entries: by section: (M, S, side, side) sums that aren't folded yet.
        ran: whether a tapped layer ran for them, with gradients.
        returned: whether a backward pass has run for them.
        ran_again: whether a forward pass followed that one.
    """

    prompt_S: torch.Tensor
    sequence_RT: torch.Tensor | None
    n_rows: int
    checked: bool = True
    total: dict[Any, torch.Tensor] = field(default_factory=dict)
    entries: dict[str, torch.Tensor] = field(default_factory=dict)
    ran: bool = False
    returned: bool = False
    ran_again: bool = False
    _pieces: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add(self, key: Any, values_S: torch.Tensor) -> None:
        """Adds (S, ...) values to the sum under ``key``."""
        values_S = values_S.to(torch.promote_types(values_S.dtype, torch.float32))
        if key in self.total:
            self.total[key] += values_S.to(self.total[key].device)
        else:
            self.total[key] = values_S.clone()

    def total_of(self, key: Any, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Returns the sum under ``key``, zeros of this shape at first."""
        if key not in self.total:
            self.total[key] = like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))
        return self.total[key]

    def entries_of(self, section: str, replicates: int, side: int, like: torch.Tensor) -> torch.Tensor:
        """Returns the section's entries (M, S, side, side), zeros at first, in at least the dtype of ``like``."""
        if section not in self.entries:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.entries[section] = like.new_zeros((replicates, len(self.prompt_S), side, side), dtype=dtype)
        return self.entries[section]

    def add_outer(self, entries: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds the sum over L layers of ``outer(left, right)`` to the whole entries; left and right (L, M, R, T, side).

        The layers count as tokens of the same position, so that the product sums over them.
        """
        left, right = (x.permute(1, 2, 3, 0, 4).flatten(2, 3).to(entries) for x in (left, right))
        if self.sequence_RT is None:  # in place, to save memory
            entries.flatten(0, 1).baddbmm_(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1))
        else:
            entries += self.outer(left, right)

    def tokens(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Returns a layer's input or output as (R, tokens of a row, width), also if the layer flattens its rows."""
        width = values.shape[-1]
        positions = None if self.sequence_RT is None else self.sequence_RT.shape[1]
        if values.ndim == 3 and values.shape[0] == self.n_rows and positions not in (None, values.shape[1]):
            raise ValueError(f"layer {name!r} saw {values.shape[1]} positions of a row whose segments hold {positions}")
        if values.ndim >= 3 and values.shape[0] == self.n_rows:
            return values.reshape(self.n_rows, -1, width)
        if values.ndim == 2 and values.shape[0] % self.n_rows == 0:
            return values.reshape(self.n_rows, -1, width)
        raise ValueError(
            f"layer {name!r} saw a tensor {tuple(values.shape)}, which {self.n_rows} rows don't fit: "
            "prompt ids of the wrong length, or a layer that regroups tokens"
        )

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Returns each sequence's sum over its tokens of left right^T, (..., S, width of left, width of right).

        ``left`` and ``right`` are (..., R, tokens of a row, width).
        """
        left, right = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (left, right))
        if self.sequence_RT is None:
            return left.transpose(-1, -2) @ right
        place_N, sequence_M = self._in_pieces(left)
        size = (len(sequence_M), self._longest(len(place_N)))
        left, right = (
            x.new_zeros(*x.shape[:-3], math.prod(size) + 1, x.shape[-1])
            .index_copy_(-2, place_N, x.flatten(-3, -2))[..., :-1, :]
            .unflatten(-2, size)
            for x in (left, right)
        )
        of_pieces = left.transpose(-1, -2) @ right
        total = of_pieces.new_zeros(*of_pieces.shape[:-3], len(self.prompt_S) + 1, *of_pieces.shape[-2:])
        return total.index_add_(-3, sequence_M, of_pieces)[..., :-1, :, :]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Returns each sequence's sum over its tokens, (..., S, width), of (..., R, tokens of a row, width)."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.sequence_RT is None:
            return values.sum(-2)
        total = values.new_zeros(*values.shape[:-3], len(self.prompt_S) + 1, values.shape[-1])
        return total.index_add_(-2, self._per_token(values), values.flatten(-3, -2))[..., :-1, :]

    def _per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Returns (N,) the sequence of each token, S for none. A layer may have several tokens per position (heads)."""
        assert self.sequence_RT is not None
        times = values.shape[-2] // self.sequence_RT.shape[1]
        sequence_N = self.sequence_RT.to(values.device).repeat_interleave(times, dim=1).flatten()
        return torch.where(sequence_N < 0, len(self.prompt_S), sequence_N)

    def _longest(self, n_tokens: int) -> int:
        """Returns a piece's tokens: the mean length, so that 2 S pieces suffice for any lengths."""
        return max(1, math.ceil(n_tokens / max(1, len(self.prompt_S))))

    def _in_pieces(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cuts sequences into pieces of one length, for one batched product of known size.

        Returns:
            (N,) the index of each token among the pieces' tokens, one past the end for tokens of no sequence; and
            (2 S,) the sequence of each piece, S for unused pieces.
        """
        key = values.shape[-2], values.device
        if key not in self._pieces:
            sequence_N = self._per_token(values)
            n_sequences, longest = len(self.prompt_S), self._longest(len(sequence_N))
            order_N = sequence_N.argsort(stable=True)
            sorted_N = sequence_N[order_N]
            zeros = sequence_N.new_zeros(n_sequences + 1)
            length_S = zeros.index_add(0, sequence_N, torch.ones_like(sequence_N))
            pieces_S = (length_S + longest - 1) // longest
            first_S, first_piece_S = length_S.cumsum(0) - length_S, pieces_S.cumsum(0) - pieces_S
            rank_N = torch.arange(len(order_N), device=order_N.device) - first_S[sorted_N]
            place_N = first_piece_S[sorted_N] * longest + rank_N
            none = 2 * n_sequences * longest
            place_N = torch.where(sorted_N == n_sequences, none, place_N)
            piece_M = torch.arange(2 * n_sequences, device=order_N.device)
            sequence_M = torch.searchsorted(pieces_S[:-1].cumsum(0), piece_M, right=True)
            self._pieces[key] = torch.empty_like(place_N).scatter_(0, order_N, place_N), sequence_M
        return self._pieces[key]
