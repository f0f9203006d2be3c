"""Holds how much one micro-batch may take: as chosen by the user, by the rehearsal, or after running out of memory."""

from __future__ import annotations

import math
from typing import Any

from .step_plan import PlanLimits


class MicroBatchSize:
    """The largest micro-batch of a run. Checkpoints keep it, so that a resumed run splits its steps alike.

    Attributes:
        option: the option ``tokens_per_micro_batch``.
        tokens: packed tokens of a micro-batch that shares prompts; None: the positions of the largest micro-batch
            without sharing.
        rows: sequences of a micro-batch that doesn't share prompts; None: TRL's number.
        chosen: whether memory decided, in the rehearsal or by running out.
    """

    def __init__(self, option: int | None) -> None:
        self.option = self.tokens = option
        self.rows: int | None = None
        self.chosen = False

    def choose(self, tokens: int) -> None:
        """Sets the number of tokens that fits into memory."""
        self.tokens, self.chosen = max(tokens, 1), True

    def halve(self, tokens: int, rows: int, *, shared: bool) -> str:
        """Allows half of the micro-batch that didn't fit; returns the new size in words.

        Args:
            tokens, rows: packed tokens and sequences of that micro-batch.
            shared: whether it shared prompts.
        """
        self.chosen = True
        if shared:
            self.tokens = max(min(tokens, self.tokens or tokens) // 2, 1)
            return f"{self.tokens} packed tokens"
        self.rows = max(rows // 2, 1)
        return f"{self.rows} sequences"

    def limits(self, rows: int, *, share: bool, least: int = 0, most: float = math.inf) -> PlanLimits:
        """Returns the limits for planning a step. ``rows``: the sequences of one of TRL's micro-batches."""
        return PlanLimits(min(rows, self.rows or rows), least, most, share, self.tokens)

    def state_dict(self) -> dict[str, Any]:
        """Returns the size as plain numbers, for JSON."""
        return {"option": self.option, "tokens": self.tokens, "rows": self.rows, "chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores a size, unless the run now sets another ``tokens_per_micro_batch`` than the saved one."""
        if state is None or state["option"] != self.option:
            return
        self.tokens, self.rows, self.chosen = state["tokens"], state["rows"], state["chosen"]
