"""Finds the checkpoint that a run resumes from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .validate import what_is_broken

AUTO, LATEST = "auto", ("true", "latest", "last")


def find_checkpoint(
    resume: str | bool | None, output_dir: str, log: Callable[[str], None] = lambda text: None
) -> str | None:
    """Returns the checkpoint folder that ``resume_from_checkpoint`` selects; None starts at step 0.

    Args:
        resume: None or False: starts at step 0. ``auto``: the newest complete checkpoint in ``output_dir``, or None if
            there is none, so that one command starts and restarts a run. True, ``true``, ``latest`` or ``last``: the
            newest complete checkpoint, which must exist. Otherwise a checkpoint's folder.
        output_dir: the run's folder.
        log: logs which checkpoint is used, and why newer ones aren't.

    Raises:
        ValueError: a checkpoint must exist and none is complete, or the folder isn't a complete checkpoint.
    """
    if not resume:
        return None
    wanted = str(resume).lower()
    if wanted != AUTO and wanted not in LATEST:
        broken = what_is_broken(Path(str(resume))) if Path(str(resume)).is_dir() else "no such folder"
        if broken is not None:
            raise ValueError(f"resume_from_checkpoint={resume}: no complete checkpoint there ({broken})")
        return str(resume)
    found, skipped = None, []
    for folder in _newest_first(output_dir):
        broken = what_is_broken(folder)
        if broken is None:
            found = str(folder)
            break
        skipped.append(f"{folder} is skipped: {broken}.")
    if found is None and wanted != AUTO:
        reasons = f" ({' '.join(skipped)})" if skipped else ""
        raise ValueError(f"resume_from_checkpoint={resume}: no complete checkpoint in {output_dir}{reasons}")
    start = f"Resuming from {found}." if found else f"No complete checkpoint in {output_dir}: starting at step 0."
    for text in (*skipped, start):
        log(text)
    return found


def newest_complete(output_dir: str | os.PathLike[str]) -> Path | None:
    """Returns the newest complete checkpoint in a run's folder; None if there is none."""
    return next((folder for folder in _newest_first(output_dir) if what_is_broken(folder) is None), None)


def _newest_first(output_dir: str | os.PathLike[str]) -> list[Path]:
    folders = [
        folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rsplit("-", 1)[1].isdecimal()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)


def check_output_dir(output_dir: str) -> None:
    """Raises ``ValueError`` if the folder can't be created or written to."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} can't be written to: {error.strerror}") from None
