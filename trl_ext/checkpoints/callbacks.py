"""Callbacks that save our state in ``trainer_state.json``, keep random states, and save a checkpoint on Ctrl-C."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_ext.advantages.normalizer import Normalizer
from trl_ext.plan.micro_batch_size import MicroBatchSize
from trl_ext.recorder.recorder import InterferenceRecorder

from .validate import OUR_STATE

logger = get_logger(__name__)


class RunCompleteError(Exception):
    """The checkpoint that training resumes from is of the run's last step."""


class CheckpointState(TrainerCallback):
    """Saves the states of the normalisation and of the interference log, and the size of a micro-batch.

    They are restored when training resumes.

    When training starts it calls each function of ``on_start``, which drops the rest of an interrupted step.
    """

    def __init__(
        self,
        normalizer: Normalizer,
        interference: InterferenceRecorder,
        size: MicroBatchSize,
        *,
        on_start: Iterable[Callable[[], None]],
    ) -> None:
        self.normalizer, self.interference, self.size, self.on_start = normalizer, interference, size, on_start
        self.stops_complete_runs = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        # transformers would train one step more, at each restart of a command with resume_from_checkpoint="auto"
        if self.stops_complete_runs and state.global_step >= state.max_steps:
            logger.warning(f"The run is complete: its checkpoint is of step {state.global_step} of {state.max_steps}.")
            raise RunCompleteError

    def save(self, state: Any) -> None:
        """Writes our state into the trainer's state, whose file is the last of a checkpoint."""
        state.stateful_callbacks[OUR_STATE] = {
            "processes": self.interference.accelerator.num_processes,
            "normalization": self.normalizer.state_dict(),
            "interference": self.interference.statistics.state_dict(),
            "started": self.interference.started,
            "micro_batch": self.size.state_dict(),
        }

    def on_train_begin(self, args, state, control, **kwargs):
        for forget in self.on_start:
            forget()
        if state.global_step == 0:
            self.interference.started = time.time()
        saved = state.stateful_callbacks.get(OUR_STATE)
        if saved is None:
            return
        self.interference.started = saved.get("started", 0.0)  # an older checkpoint lacks it
        with self.interference.guarded():
            self.interference.statistics.load_state_dict(saved["interference"])
        self.size.load_state_dict(saved.get("micro_batch"))  # an older checkpoint lacks it
        if not self.normalizer.load_state_dict(saved["normalization"]):
            logger.warning(
                "The checkpoint was saved with another normalization, reward functions or multi_objective_aggregation: "
                "the normalisation's state starts from nothing."
            )


class RandomStates(TrainerCallback):
    """Keeps the random states of Python, numpy, torch and the GPU after each optimizer step, as a checkpoint does."""

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None

    def on_step_end(self, args, state, control, **kwargs):
        on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu

    def restore(self) -> None:
        """Restores the states of the latest optimizer step."""
        if self._states is None:
            return
        of_python, of_numpy, of_torch, on_gpu = self._states
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


class StopWithCheckpoint(TrainerCallback):
    """Saves a checkpoint after the current optimizer step and stops, on SIGINT (Ctrl-C) or SIGTERM.

    A second signal ends the process at once. If any rank gets a signal, all ranks stop after the same step.
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
        # print() isn't safe in a signal handler
        os.write(2, b"\nStopping: finishing this step and saving a checkpoint (once more to stop at once).\n")

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
            self.stopped = control.should_save = control.should_training_stop = True
