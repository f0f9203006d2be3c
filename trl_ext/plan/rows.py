"""Tabulates the length and flags of each sequence for planning, and sorts sequences into batches by length.

Shapes: B sequences of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_ext.schema import Sequences


@dataclass(frozen=True)
class RowTable:
    """Lengths and flags of each row, (B,) int64 on the CPU, copied together so that planning waits for the GPU once.

    Attributes:
        prompt_B, answer_B: tokens of prompt and completion.
        last_B: columns of the completion up to its last token; more than ``answer_B`` if the mask has gaps.
        loss_tokens_B: number of tokens that the loss counts.
        id_B: ``prompt_id``, -1 if the batch has none.
        wanted_B: (B,) bool, whether the row shall run.
        packable: whether prompts can be shared: prompt ids exist, no row has a gap or an empty prompt, and the model
            takes no token types.
        unchanged: whether all advantages are our normalisation's.
    """

    prompt_B: torch.Tensor
    answer_B: torch.Tensor
    last_B: torch.Tensor
    loss_tokens_B: torch.Tensor
    id_B: torch.Tensor
    wanted_B: torch.Tensor
    packable: bool
    unchanged: bool = False

    @property
    def length_B(self) -> torch.Tensor:  # noqa: N802
        """(B,), tokens of prompt and completion together."""
        return self.prompt_B + self.answer_B

    def longest(self, index_B: torch.Tensor) -> tuple[int, int]:
        """Returns how many prompt and completion columns these rows need, at least 1 each."""
        return max(int(self.prompt_B[index_B].max()), 1), max(int(self.last_B[index_B].max()), 1)


def read_rows(rows: Sequences, wanted_B: torch.Tensor, unchanged_B: torch.Tensor | None = None) -> RowTable:
    """Reads the table of ``rows``.

    Args:
        wanted_B: (B,) bool, whether the row shall run.
        unchanged_B: (B,) bool, whether the advantage is our normalisation's; None counts as False.
    """
    prompt_BT, answer_BT = rows.prompt_mask, rows.completion_mask
    column_T = torch.arange(1, answer_BT.shape[1] + 1, device=answer_BT.device)
    nothing_B = answer_BT.new_zeros(len(answer_BT))
    gap_B = (prompt_BT.diff(dim=1) < 0).any(1) | (answer_BT.diff(dim=1) > 0).any(1) | (prompt_BT[:, -1] == 0)
    prompt_id_B = rows.prompt_id
    columns = [
        prompt_BT.sum(1),
        answer_BT.sum(1),
        (answer_BT * column_T).amax(1) if answer_BT.shape[1] else nothing_B,
        rows.live_tokens,
        nothing_B - 1 if prompt_id_B is None else prompt_id_B,
        wanted_B,
        gap_B,
        nothing_B if unchanged_B is None else unchanged_B,
    ]
    table = torch.stack([column.to(answer_BT.device, torch.int64) for column in columns]).cpu()
    prompt_B, answer_B, last_B, loss_tokens_B, id_B, wanted_B, gap_B, unchanged_B = table.unbind(0)
    packable = prompt_id_B is not None and not rows.token_types and not bool(gap_B.any())
    unchanged = len(table[0]) > 0 and bool(unchanged_B.all())
    return RowTable(prompt_B, answer_B, last_B, loss_tokens_B, id_B, wanted_B.bool(), packable, unchanged)


def even_batches(table: RowTable, n_batches: int) -> list[torch.Tensor]:
    """Splits the wanted rows into ``n_batches`` of even size, sorted by length; returns their indices.

    If fewer rows are wanted than there are batches, the shortest other rows fill them up; rows without a token in the
    loss come last. The longest rows come first, so that a run that is out of memory fails at once.
    """
    if n_batches == 0:
        return []
    order_B = table.length_B.argsort(descending=True, stable=True)
    chosen = order_B[table.wanted_B[order_B]]
    if len(chosen) < n_batches:
        others = order_B[~table.wanted_B[order_B]]
        empty_B = table.loss_tokens_B[others] == 0
        others = torch.cat([others[empty_B], others[~empty_B]])
        chosen = torch.cat([chosen, others[len(others) - (n_batches - len(chosen)) :]])
    return list(chosen.tensor_split(n_batches))


@dataclass(frozen=True)
class Trimming:
    """Which columns of padding are trimmed: before prompts, after completions.

    Widths stay a multiple of ``multiple_of``, which is TRL's ``pad_to_multiple_of``.
    """

    prompts: bool = False
    completions: bool = False
    multiple_of: int | None = None

    def select(self, rows: Sequences, index_B: torch.Tensor, table: RowTable) -> Sequences:
        """Returns the rows ``index_B``, without columns that are padding in all of them."""
        prompt, completion = table.longest(index_B)
        return rows.select(
            index_B,
            self._width(prompt, rows.prompt_width) if self.prompts else None,
            self._width(completion, rows.width) if self.completions else None,
        )

    def _width(self, needed: int, most: int) -> int:
        return needed if self.multiple_of is None else min(most, -(-needed // self.multiple_of) * self.multiple_of)
