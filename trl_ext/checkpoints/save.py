"""Removes incomplete checkpoints, and saves one when a reward function fails."""

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
    """A checkpoint couldn't be saved. The message names the folder, the free space, and the newest checkpoint."""


def _size(n_bytes: int) -> str:
    power = min(3, max(0, n_bytes.bit_length() - 1) // 10)
    return f"{n_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@contextmanager
def complete_or_none(folder: Path, output_dir: str) -> Iterator[None]:
    """Removes an incomplete ``folder`` if an error occurs in this context, and raises ``CheckpointError``.

    A complete checkpoint stays: then the error came later (an upload, the removal of older checkpoints).
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
            f"({type(error).__name__}: {first_line:.200}); the incomplete checkpoint is removed, and "
            + (f"the newest complete one is {left.name}" if left is not None else "there is no earlier one")
        ) from error


@contextmanager
def saved_when(failure: type[Exception], trainer: Any, states: RandomStates) -> Iterator[None]:
    """Saves a checkpoint of the latest step if ``failure`` is raised, which all ranks do before an optimizer step.

    It doesn't if the run saves no checkpoints, no step is complete, or the step's checkpoint exists.
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
                logger.warning(f"The run stops. {folder} holds its latest step.")
            except CheckpointError as error:
                logger.warning(f"The run stops. Its latest step is lost: {error}.")
        raise


def checkpoint_folder(trainer: Any) -> Path:
    """Returns the folder of the latest step's checkpoint."""
    return Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
