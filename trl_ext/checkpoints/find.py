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
    resume: str | bool | None, output_dir: str, say: Callable[[str], None] = lambda text: None
) -> str | None:
    """The checkpoint folder that ``resume_from_checkpoint`` means, or None for a start at step 0.

    Args:
        resume: None or False: from the start. ``auto``: the newest complete checkpoint in ``output_dir``, if there is
            one, so that one command starts a run and restarts it. True, ``true`` or ``latest``: the same, and there
            must be one. Else a folder.
        output_dir: the run's folder.
        say: logs which checkpoint is used, and why each newer one isn't.

    Raises:
        ValueError: there must be a checkpoint and none is complete; or the folder isn't one (names the broken file).
    """
    if not resume:
        return None
    wanted = str(resume).lower()
    if wanted != AUTO and wanted not in LATEST:
        broken = what_is_broken(Path(str(resume))) if Path(str(resume)).is_dir() else "no such folder"
        if broken is not None:
            raise ValueError(f"resume_from_checkpoint={resume}: no whole checkpoint there ({broken})")
        return str(resume)
    found, passed_over = None, []
    for folder in _newest_first(output_dir):
        broken = what_is_broken(folder)
        if broken is None:
            found = str(folder)
            break
        passed_over.append(f"{folder} is passed over: {broken}.")
    if found is None and wanted != AUTO:
        reasons = f" ({' '.join(passed_over)})" if passed_over else ""
        raise ValueError(f"resume_from_checkpoint={resume}: no whole checkpoint in {output_dir}{reasons}")
    start = f"Going on from {found}." if found else f"No whole checkpoint in {output_dir}: from the start."
    for text in (*passed_over, start):
        say(text)
    return found


def newest_complete(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    return next((folder for folder in _newest_first(output_dir) if what_is_broken(folder) is None), None)


def _newest_first(output_dir: str | os.PathLike[str]) -> list[Path]:
    folders = [
        folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rsplit("-", 1)[1].isdecimal()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)


def check_output_dir(output_dir: str) -> None:
    """Raises ``ValueError`` unless the folder can be made and written to."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} can't be written to: {error.strerror}") from None
