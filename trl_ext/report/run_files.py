"""What a run leaves in its folder for a report: its configuration, and TRL's log line by line while it goes.

``run_config.json``: the trainer's arguments. ``log_history.jsonl``: every entry of TRL's log, as it is logged, so that
a run which is still going, or was killed, can be looked at; where it resumes there is an entry, and what was logged of
later steps before it doesn't count. A run that starts anew in a used folder starts a new log.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import TrainerCallback

logger = get_logger(__name__)
CONFIG_FILE, LOG_FILE = "run_config.json", "log_history.jsonl"
STARTED, RESUMED = "started_at", "resumed"  # seconds since the epoch, kept over resumes; an entry where a run goes on


def started_at(folder: Path) -> float | None:
    """When the run in this folder began, or None where that isn't known."""
    try:
        return float(json.loads((folder / CONFIG_FILE).read_text())[STARTED])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _ends_a_line(path: Path) -> bool:
    """Whether a file ends with a whole line, or has none."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def describe_run(args: Any, model: Any, trainer: type, reward_functions: list[str]) -> dict[str, Any]:
    """For the run's folder: every option, and what else tells runs apart."""
    return {
        **args.to_dict(),
        "model_name_or_path": model.config._name_or_path,
        "trainer": trainer.__name__,
        "reward_functions": reward_functions,
        "num_processes": args.world_size,
        "adapter": type(model).__name__ if is_peft_model(model) else None,
    }


class RunFiles(TrainerCallback):
    """Writes both on the main process. What fails is said once, and training goes on without."""

    def __init__(self, describe: Any) -> None:
        self._describe = describe  # () -> the configuration, of what JSON can hold
        self._on = True

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config = {STARTED: time.time(), **self._describe()}
            if state.global_step == 0:
                (folder / LOG_FILE).unlink(missing_ok=True)
            else:
                config[STARTED] = started_at(folder) or config[STARTED]
                half_a_line = not _ends_a_line(folder / LOG_FILE)  # a kill may have left one
                with open(folder / LOG_FILE, "a") as file:
                    resumed = json.dumps({RESUMED: True, "step": state.global_step})
                    file.write(("\n" if half_a_line else "") + resumed + "\n")
            scratch = folder / f".{CONFIG_FILE}.{os.getpid()}"
            scratch.write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
            scratch.replace(folder / CONFIG_FILE)
        except Exception as error:
            self._fail(error)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not self._on:
            return
        try:
            with open(Path(args.output_dir) / LOG_FILE, "a") as file:
                file.write(json.dumps({**(logs or {}), "step": state.global_step}, default=str) + "\n")
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._on = False
        logger.warning(f"The run's log isn't kept in its folder: {type(error).__name__}: {error}. Training goes on.")
