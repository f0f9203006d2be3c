"""A run can be stopped and goes on: Ctrl-C saves a checkpoint, and resuming finds the newest whole one."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

LATEST = ("true", "latest", "last")


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end (the trainer's state is written last)."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(resume: str | None, output_dir: str) -> str | None:
    """The checkpoint folder that ``--resume_from_checkpoint`` means, or None where it isn't given.

    ``true`` or ``latest`` is the newest whole one in ``output_dir``; a half-written one (the run was killed while
    saving) is passed over. Raises ``ValueError`` when there is none, or the folder isn't a whole checkpoint.
    """
    if not resume:
        return None
    if resume.lower() not in LATEST:
        if not is_whole(Path(resume)):
            raise ValueError(f"--resume_from_checkpoint {resume}: no whole checkpoint there (no {TRAINER_STATE_NAME})")
        return resume
    found = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_whole(folder)]
    if not found:
        raise ValueError(f"--resume_from_checkpoint {resume}: no checkpoint in {output_dir}")
    return str(max(found, key=lambda folder: int(folder.name.rsplit("-", 1)[1])))


def check_output_dir(output_dir: str) -> None:
    """Raises ``ValueError`` unless the folder can be made and written to."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} can't be written to: {error.strerror}") from None


class StopWithCheckpoint(TrainerCallback):
    """On SIGINT (Ctrl-C) or SIGTERM: finish the optimizer step, save a checkpoint, stop. A second signal ends at once.

    With several processes all stop at the same step, when any of them got the signal.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._signalled = False
        self._previous: dict[int, Any] = {}

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signalled = True
        text = "\nStopping: finishing this step and saving a checkpoint (once more to stop at once).\n"
        os.write(2, text.encode())  # print() isn't safe in a signal handler

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_step_end(self, args, state, control, **kwargs):
        signalled = self._signalled
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor(int(signalled), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            signalled = bool(flag.item())
        if signalled:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
