"""Writes a run's configuration and log into its folder, for the report.

``run_config.json`` holds the trainer's arguments. ``log_history.jsonl`` gets each entry of TRL's log at once, so that a
run which is still going, or was killed, can be looked at. A resume is an entry of its own: earlier entries of later
steps don't count. A run that starts anew in a used folder starts a new log.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import TrainerCallback

logger = get_logger(__name__)
CONFIG_FILE, LOG_FILE = "run_config.json", "log_history.jsonl"
Configuration = dict[str, Any]  # a run's options, as JSON holds them
STARTED, RESUMED = "started_at", "resumed"  # seconds since the epoch, kept over resumes; an entry where a run goes on


def started_at(folder: Path) -> float | None:
    """When the run in this folder began, or None where that isn't known."""
    try:
        return float(json.loads((folder / CONFIG_FILE).read_text())[STARTED])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def describe_run(args: Any, model: Any, trainer: type, reward_functions: list[str]) -> Configuration:
    """The configuration that is kept: every option, and what else tells runs apart."""
    return {
        **args.to_dict(),
        "model_name_or_path": model.config._name_or_path,
        "trainer": trainer.__name__,
        "reward_functions": reward_functions,
        "num_processes": args.world_size,
        "adapter": type(model).__name__ if is_peft_model(model) else None,
    }


def append_resume(log: Path, step: int) -> None:
    """Adds the entry of a resume, on a line of its own even where a kill left half a line."""
    cut = log.is_file() and log.read_bytes()[-1:] not in (b"", b"\n")
    with open(log, "a") as file:
        file.write("\n" * cut + json.dumps({RESUMED: True, "step": step}) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text, errors="replace")
    scratch.replace(file)


class RunFiles(TrainerCallback):
    """Writes both files on the main process. A failure is logged once, and training goes on without them."""

    def __init__(self, describe: Callable[[], Configuration]) -> None:
        self._describe = describe
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
                append_resume(folder / LOG_FILE, state.global_step)
            replace_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, default=str))
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
