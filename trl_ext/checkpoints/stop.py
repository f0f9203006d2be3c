"""A run can be stopped and goes on: Ctrl-C saves a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


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
