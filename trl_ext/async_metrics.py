"""Keeps a call of ``AsyncGRPOTrainer.compute_loss`` out of what TRL logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# TRL's counts of an optimizer step, to which each call of compute_loss and training_step adds
COUNTS = (
    "_step_microbatches",
    "_step_forward_tokens",
    "_step_trained_tokens",
    "_step_seq_len_weighted",
    "_step_samples",
)


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Keeps what this context runs out of the trainer's metrics and counts."""
    before = {name: getattr(trainer, name) for name in ("_metrics", *COUNTS)}
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
