"""Logs each verdict on a run once while it goes, and stops the run where ``stop_on`` asks for it.

It leaves out advice and verdicts on interference files: ``python -m trl_ext check`` has them. A failure is logged once
and ends the watch, not the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_ext.compat import RunSettings

from .read_run import Run
from .verdicts import LEVELS, Verdict, diagnose

logger = get_logger(__name__)
OFTEN = 1.02  # the log grows by so much between two looks at all of it


def looked_at(length: int) -> int:
    """How many entries of a log of this length are looked at: the same after a resume as without one."""
    look, after = 0, 1
    while after <= length:
        look, after = after, max(after + 1, math.ceil(after * OFTEN))
    return look


class Watch(TrainerCallback):
    """Looks at the log of ``run``; ``log`` takes metrics for TRL's next log.

    Every process looks at the same log; if ``stop_on`` is set they decide together.
    """

    def __init__(self, run: RunSettings, log: Callable[[Mapping[str, float]], None]) -> None:
        self.run, self.log = run, log
        self._said: set[str] = set()
        self._counts: dict[str, float] = {}
        self._seen, self._on = 0, True

    def on_train_begin(self, args, state, control, **kwargs):
        if state.log_history:  # resumed
            self._guarded_look(state, args.logging_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self.log(self._counts)  # TRL drops what comes while it logs

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or any(name.startswith("eval_") for name in logs) or "train_runtime" in logs:
            return
        found = self._guarded_look(state, args.logging_steps)
        # also a process that can't look takes part: the others would wait for it
        if self.run.options.stop_on is not None and self._stop([one.level for one in found]):
            control.should_save = control.should_training_stop = True
            asked = f"stop_on={self.run.options.stop_on!r}"
            logger.warning(f"Training stops at step {state.global_step}, with a checkpoint: {asked}.")

    def _guarded_look(self, state: Any, logging_steps: float) -> list[Verdict]:
        try:
            return self._look(state, logging_steps) if self._on else []
        except Exception as error:
            logger.warning(f"The run isn't watched from here on: {type(error).__name__}: {error}. Training goes on.")
            self._on = False
            return []

    def _look(self, state: Any, logging_steps: float = 1) -> list[Verdict]:
        length = looked_at(len(state.log_history))
        if length == self._seen:
            return []
        self._seen, history = length, state.log_history[:length]
        config = {name: getattr(self.run, name) for name in ("num_generations", "generation_batch_size")}
        config["logging_steps"] = logging_steps
        so_far = Run(Path(self.run.output_dir), "", list(history), [], config)
        found = [one for one in diagnose(so_far).verdicts if one.level != "advice"]
        for one in found:
            if one.name not in self._said:
                self._said.add(one.name)
                self._say(one)
        counts = {f"verdicts/{level}": float(sum(one.level == level for one in found)) for level in LEVELS[:2]}
        self._counts = {name: count for name, count in counts.items() if count}
        return found

    def _say(self, one: Verdict) -> None:
        logger.warning(f"{one.level}: {one.title}, since step {one.onset}. {one.evidence}. {one.remedy}")
        if "wandb" not in self.run.report_to or not self.run.accelerator.is_main_process:
            return
        try:
            import wandb

            if wandb.run is not None:
                wandb.run.alert(title=one.title, text=f"Since step {one.onset}: {one.evidence}. {one.remedy}")
        except Exception as error:
            self.run.log_once(f"Verdicts don't go to wandb: {type(error).__name__}: {error}.")

    def _stop(self, levels: list[str]) -> bool:
        worse = LEVELS[: LEVELS.index(self.run.options.stop_on) + 1]
        mine = torch.tensor([any(level in worse for level in levels)], device=self.run.accelerator.device)
        return bool(self.run.accelerator.gather(mine).any())
