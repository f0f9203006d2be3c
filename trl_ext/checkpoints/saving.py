"""A checkpoint is saved whole or not at all; and one is saved when the rewards of the next step fail."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .find import newest_whole
from .whole import what_is_broken

logger = get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint couldn't be saved: where, how much room there is, and what is left."""


def _size(n_bytes: int) -> str:
    power = min(3, max(0, n_bytes.bit_length() - 1) // 10)
    return f"{n_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@contextmanager
def whole_or_none(folder: Path, output_dir: str) -> Iterator[None]:
    """What is half written into ``folder`` when saving fails is removed. Raises ``CheckpointError``, one sentence.

    A checkpoint that is whole stays: what failed came after it (an upload, the removal of older ones).
    """
    try:
        yield
    except Exception as error:
        if what_is_broken(folder) is None:
            raise
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        room = shutil.disk_usage(there)  # before anything is removed
        shutil.rmtree(folder, ignore_errors=True)
        left = newest_whole(output_dir)
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder} couldn't be saved, {_size(room.free)} of {_size(room.total)} are free there "
            f"({type(error).__name__}: {first_line:.200}); what was half written is removed, and "
            + (f"the newest whole checkpoint is {left.name}" if left is not None else "no earlier checkpoint is there")
        ) from error


class RandomStates(TrainerCallback):
    """Of Python, numpy, torch and the GPU as the latest optimizer step left them: what a checkpoint of it holds."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] | None = None

    def on_step_end(self, args, state, control, **kwargs):
        on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._kept = random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu

    def restore(self) -> None:
        """Puts them back."""
        if self._kept is None:
            return
        of_python, of_numpy, of_torch, on_gpu = self._kept
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


@contextmanager
def saved_when(failure: type[Exception], trainer: Any, states: RandomStates) -> Iterator[None]:
    """A ``failure`` of training, which all processes have, before the step's optimizer: the step before is saved.

    Not where this run saves none, no step is done yet, or that step's checkpoint is there.
    """
    try:
        yield
    except failure:
        folder = checkpoint_folder(trainer)
        saves = trainer.args.save_strategy != "no" and trainer.state.global_step > 0
        if saves and what_is_broken(folder) is not None:
            states.restore()
            try:
                trainer._save_checkpoint(trainer.model, trial=None)
                logger.warning(f"The run stops, and {folder} holds its latest step.")
            except CheckpointError as error:
                logger.warning(f"The run stops, and its latest step is lost: {error}.")
        raise


def checkpoint_folder(trainer: Any) -> Path:
    """Of the latest step."""
    return Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
