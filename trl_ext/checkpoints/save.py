"""Saves a checkpoint completely or not at all; and saves one when the rewards of the next step fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .callbacks import RandomStates
from .find import newest_complete
from .validate import what_is_broken

logger = get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint couldn't be saved: where, how much room there is, and what is left."""


def _size(n_bytes: int) -> str:
    power = min(3, max(0, n_bytes.bit_length() - 1) // 10)
    return f"{n_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@contextmanager
def complete_or_none(folder: Path, output_dir: str) -> Iterator[None]:
    """Removes a half-written ``folder`` when saving it fails, and raises ``CheckpointError``, one sentence.

    A complete checkpoint stays: what failed came after it (an upload, the removal of older ones).
    """
    try:
        yield
    except Exception as error:
        if what_is_broken(folder) is None:
            raise
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        room = shutil.disk_usage(there)  # before anything is removed
        shutil.rmtree(folder, ignore_errors=True)
        left = newest_complete(output_dir)
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder} couldn't be saved, {_size(room.free)} of {_size(room.total)} are free there "
            f"({type(error).__name__}: {first_line:.200}); what was half written is removed, and "
            + (f"the newest whole checkpoint is {left.name}" if left is not None else "no earlier checkpoint is there")
        ) from error


@contextmanager
def saved_when(failure: type[Exception], trainer: Any, states: RandomStates) -> Iterator[None]:
    """Saves the latest step when training raises ``failure``, which all processes do before the step's optimizer.

    Not if this run saves none, no step is done yet, or that step's checkpoint exists.
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
    """The folder of the latest step's checkpoint."""
    return Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
