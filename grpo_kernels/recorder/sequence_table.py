"""``SequenceTable`` holds the metadata of a logged step's sequences, such as rewards and coefficients.

Shapes: B sequences of a micro-batch, of the step on this rank, or of all ranks; G completions of one prompt, F
reward functions.

Flow: a micro-batch's table -> ``join`` over the step's micro-batches -> ``pack``, a gather over ranks, ``unpack`` ->
``measure.py`` and ``files.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class SequenceTable:
    """One row per sequence, in columns. Floats are float32 unless noted.

    Attributes:
        prompt_id, prompt_key: (B,) int64.
        position: (B,) int64, the sequence's position in its group.
        length: (B,) int64, generated tokens.
        advantage: (B,), as trained; NaN if single tokens have advantages of their own.
        score_advantage: (B,), the advantage that the coefficient contains; 1 if the extra pass scored the sequence.
        weight: (B,), the weight of a token in the loss.
        group_rewards: (B, G), the rewards of the sequence's group, NaN where unscorable.
        function_rewards: (B, F), NaN where unscorable.
        square: (B,) float64, |u_i|^2; 0 until the step's sketch ends.
        coefficient: (B,) c_i; None if the tokens of a sequence have different coefficients.
    """

    prompt_id: torch.Tensor
    prompt_key: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    advantage: torch.Tensor
    score_advantage: torch.Tensor
    weight: torch.Tensor
    group_rewards: torch.Tensor
    function_rewards: torch.Tensor
    square: torch.Tensor
    coefficient: torch.Tensor | None

    @classmethod
    def join(cls, tables: Sequence[SequenceTable]) -> SequenceTable:
        """Concatenates tables; coefficients are None if one table has none."""
        columns = {field.name: [getattr(table, field.name) for table in tables] for field in fields(cls)}
        known = all(column is not None for column in columns["coefficient"])
        joined = {name: torch.cat(column) for name, column in columns.items() if name != "coefficient"}
        return cls(**joined, coefficient=torch.cat(columns["coefficient"]) if known else None)

    def __len__(self) -> int:
        return len(self.prompt_id)

    def padded(self, count: int) -> SequenceTable:
        """Returns the table with zeros appended up to ``count`` sequences."""
        missing = count - len(self)
        columns = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{n: torch.cat([v, v.new_zeros(missing, *v.shape[1:])]) for n, v in columns.items()})

    def to(self, device: torch.device | str) -> SequenceTable:
        """Returns the table on this device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})

    @property
    def extra(self) -> torch.Tensor:
        """(B,) bool: whether the extra pass scored the sequence; it contributes nothing to the step's gradient."""
        return (self.score_advantage != self.advantage) & ~self.advantage.isnan()

    @property
    def reward(self) -> torch.Tensor:
        """(B,) weighted rewards, NaN where unscorable."""
        return self.group_rewards.gather(1, self.position[:, None]).squeeze(1)

    def pack(self) -> torch.Tensor:
        """Packs the columns to (B, N) int64, with the bits of floats as float64, for a single all-gather."""
        columns = []
        for name, value in vars(self).items():
            if value is None:
                value = torch.full_like(self.weight, torch.nan)
            column = value if name in INTEGERS else value.double().view(torch.int64)
            columns.append(column.reshape(len(self), -1))
        return torch.cat(columns, dim=1)

    def unpack(self, packed_BN: torch.Tensor) -> SequenceTable:
        """Unpacks a gathered table, whose columns have the widths of this table's."""
        widths = [1 if value is None else value[:1].numel() for value in vars(self).values()]
        unpacked: dict[str, torch.Tensor | None] = {}
        for (name, value), column in zip(vars(self).items(), packed_BN.split(widths, dim=1), strict=True):
            if name not in INTEGERS:
                column = column.contiguous().view(torch.float64)
                column = column if name == "square" else column.float()
            unpacked[name] = column if value is not None and value.ndim == 2 else column.squeeze(1)
        if (coefficient_B := unpacked["coefficient"]) is not None and coefficient_B.isnan().any():
            unpacked["coefficient"] = None
        return replace(self, **unpacked)  # type: ignore[arg-type]


INTEGERS = ("prompt_id", "prompt_key", "position", "length")
