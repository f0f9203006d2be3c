"""``SequenceTable``: what is known of each sequence of a logged step beside its gradient.

Shapes: B sequences of a micro-batch, of the step on this process, or of all processes; G completions of one prompt, F
reward functions.

Flow: TRL's dict -> ``of_batch`` -> ``join`` over the step's micro-batches -> ``pack``, a gather over processes,
``unpack`` -> ``measure.py`` and ``files.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # files are read without TRL
    from trl_ext.schema import Sequences


@dataclass(frozen=True)
class SequenceTable:
    """A row for each sequence.

    ``prompt_id``, ``prompt_key``, ``position`` (in the group) and ``length`` (generated tokens): int64 (B,).
    ``advantage``: as trained, NaN where tokens have advantages of their own. ``made_at``: the advantage within the
    coefficient, which is 1 where a sequence of advantage 0 was scored by the extra pass. ``weight``: of a token in the
    loss. ``coefficient``: c_i, None where it isn't known. All float32 (B,). ``group_rewards`` (B, G) of the whole group
    and ``function_rewards`` (B, F), float32, NaN where unscorable. ``square``: |u_i|^2, float64 (B,), 0 until the
    sketch is there.
    """

    prompt_id: torch.Tensor
    prompt_key: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    advantage: torch.Tensor
    made_at: torch.Tensor
    weight: torch.Tensor
    group_rewards: torch.Tensor
    function_rewards: torch.Tensor
    square: torch.Tensor
    coefficient: torch.Tensor | None

    @classmethod
    def of_batch(cls, batch: Sequences, first_prompt: int, coefficient_B: torch.Tensor | None) -> SequenceTable:
        """The batch's prompt ids are counted from ``first_prompt``."""
        advantage_B = batch.advantages
        if advantage_B.dim() != 1:
            advantage_B = torch.full_like(advantage_B[:, 0], torch.nan)
        return cls(
            prompt_id=batch.prompt_id + first_prompt,
            prompt_key=batch.prompt_key,
            position=batch.group_position,
            length=batch.generated,
            advantage=advantage_B,
            made_at=advantage_B,
            weight=batch.token_weight,
            group_rewards=batch.group_rewards,
            function_rewards=batch.function_rewards,
            square=torch.zeros_like(advantage_B, dtype=torch.float64),
            coefficient=coefficient_B,
        )

    @classmethod
    def of_skipped(cls, batch: Sequences, first_prompt: int) -> SequenceTable:
        """The same of sequences that don't run: their coefficient is 0."""
        return cls.of_batch(batch, first_prompt, torch.zeros_like(batch.token_weight))

    @classmethod
    def join(cls, tables: Sequence[SequenceTable]) -> SequenceTable:
        """One after the other; coefficients are known where all of them are."""
        columns = {field.name: [getattr(table, field.name) for table in tables] for field in fields(cls)}
        known = all(column is not None for column in columns["coefficient"])
        joined = {name: torch.cat(column) for name, column in columns.items() if name != "coefficient"}
        return cls(**joined, coefficient=torch.cat(columns["coefficient"]) if known else None)

    def __len__(self) -> int:
        return len(self.prompt_id)

    def cpu(self) -> SequenceTable:
        """The same on the CPU."""
        return replace(self, **{name: value.cpu() for name, value in vars(self).items() if value is not None})

    @property
    def extra(self) -> torch.Tensor:
        """(B,) bool: scored by the extra pass, so that they contribute nothing to the step's gradient."""
        return (self.made_at != self.advantage) & ~self.advantage.isnan()

    @property
    def reward(self) -> torch.Tensor:
        """(B,) weighted, NaN where unscorable."""
        return self.group_rewards.gather(1, self.position[:, None]).squeeze(1)

    def pack(self) -> torch.Tensor:
        """(B, N) int64, to be gathered in one exchange; floats as the bits of their float64."""
        columns = []
        for name, value in vars(self).items():
            if value is None:
                value = torch.full_like(self.weight, torch.nan)
            column = value if name in INTEGERS else value.double().view(torch.int64)
            columns.append(column.reshape(len(self), -1))
        return torch.cat(columns, dim=1)

    def unpack(self, packed_BN: torch.Tensor) -> SequenceTable:
        """The table that was packed, of columns as wide as this one's."""
        widths = [1 if value is None else value[:1].numel() for value in vars(self).values()]
        unpacked: dict[str, Any] = {}
        for (name, value), column in zip(vars(self).items(), packed_BN.split(widths, dim=1), strict=True):
            if name not in INTEGERS:
                column = column.contiguous().view(torch.float64)
                column = column if name == "square" else column.float()
            unpacked[name] = column if value is not None and value.ndim == 2 else column.squeeze(1)
        if unpacked["coefficient"].isnan().any():
            unpacked["coefficient"] = None
        return replace(self, **unpacked)


INTEGERS = ("prompt_id", "prompt_key", "position", "length")
