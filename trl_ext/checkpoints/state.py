"""What a run remembers from step to step, in ``trainer_state.json``: there whenever a checkpoint is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_ext.advantages.normalizer import Normalizer
from trl_ext.recorder.recorder import InterferenceRecorder

from .whole import OUR_STATE

logger = get_logger(__name__)


class CheckpointState(TrainerCallback):
    """Saves the states of the normalisation and of the interference log, and takes them up where training resumes.

    ``on_start`` are called when training starts: whatever an earlier training left half done is forgotten.
    """

    def __init__(
        self, normalizer: Normalizer, interference: InterferenceRecorder, *, on_start: Iterable[Callable[[], None]]
    ) -> None:
        self.normalizer, self.interference, self.on_start = normalizer, interference, on_start

    def save(self, state: Any) -> None:
        """Into the trainer's state, whose file is the last of a checkpoint."""
        state.stateful_callbacks[OUR_STATE] = {
            "processes": self.interference.accelerator.num_processes,
            "normalization": self.normalizer.state_dict(),
            "interference": self.interference.state_dict(),
        }

    def on_train_begin(self, args, state, control, **kwargs):
        for forget in self.on_start:
            forget()
        saved = state.stateful_callbacks.get(OUR_STATE)
        if saved is None:
            return
        self.interference.load_state_dict(saved["interference"])
        if not self.normalizer.load_state_dict(saved["normalization"]):
            logger.warning(
                "The checkpoint was saved with another normalization, reward functions or multi_objective_aggregation: "
                "the normalisation's state starts anew."
            )
