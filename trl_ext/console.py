"""Prints a run's progress: one row of metrics per logged step, and on a terminal a bar that says what is going on.

The trainer uses it on terminals in place of transformers' progress bar, which prints TRL's whole dictionary.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from .stage_seconds import StageSeconds

# heading, width, name of the trainer's metric, format
COLUMNS = (
    ("step", 6, "step", "{:.0f}"),
    ("reward", 8, "reward", "{:.3f}"),
    ("held-out", 10, "eval_accuracy", "{:.3f}"),
    ("dead", 6, "normalization/zero_variance_frac", "{:.0%}"),
    ("length", 8, "completions/mean_length", "{:.1f}"),
    ("entropy", 9, "entropy", "{:.3f}"),
    ("grad", 8, "grad_norm", "{:.3f}"),
    ("s/step", 8, "step_time", "{:.2f}"),
    ("left", 9, "left", "{}"),
)
OTHER_NAMES = {"eval_accuracy": "eval_reward", "entropy": "entropy_live"}  # where the first isn't logged
LEGEND = (
    "reward: mean of the sampled answers. held-out: accuracy (else reward) on questions that aren't trained on. dead:\n"
    "share of dead groups, whose answers all got the same reward; they have no gradient. length: mean answer length,\n"
    "in tokens. entropy: how unsure the policy is of each token, in nats (0: certain), of the answers that ran. grad:\n"
    "norm of the gradient before clipping. s/step: seconds per step. left: time to the last step, at this speed."
)
STAGES = {"generation": "generating", "rewards": "rewards", "log_probs": "log-probs", "step": "forward and backward"}
ADVISE_AFTER = 2  # logged steps in a row with the same problem


def on_a_terminal() -> bool:
    return sys.stdout.isatty()


def use_console(trainer: Any, *, anywhere: bool = False) -> None:
    """Puts the console in place of transformers' progress bar.

    Args:
        anywhere: also where standard output isn't a terminal, and in place of TRL's dictionary (``disable_tqdm``).
            By default only transformers' own bar is replaced, and only on a terminal: notebooks keep theirs.
    """
    replaced = [
        callback
        for callback in trainer.callback_handler.callbacks
        if type(callback) in (PrinterCallback, ProgressCallback, ConsoleCallback)  # a user's subclass stays
    ]
    if not anywhere and (ProgressCallback not in map(type, replaced) or not on_a_terminal()):
        return
    for callback in replaced:
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleCallback(trainer.stage_seconds))


def advice(metrics: Mapping[str, float | None], max_completion_length: int) -> dict[str, str]:
    """Returns reasons why no group of this logged step has a gradient, by name, each with advice on what to change."""
    found: dict[str, str] = {}
    if metrics.get("normalization/zero_variance_frac") != 1:
        return found
    if metrics.get("completions/clipped_ratio") == 1:
        found["cut"] = (
            f"every answer was truncated at max_completion_length={max_completion_length}, and no group has a "
            "gradient. Raise max_completion_length, or ask for shorter answers."
        )
    if metrics.get("accuracy") == 0:
        found["wrong"] = (
            "every answer was wrong, so no group has a gradient. Take easier questions, a stronger model, or more "
            "answers per prompt (num_generations). Or the model misunderstands the question: log_completions=True "
            "shows its answers."
        )
    return found


def format_row(metrics: Mapping[str, Any]) -> str:
    """Returns one row of the table; the cell of a missing metric is empty."""
    cells = []
    for _, width, name, layout in COLUMNS:
        value = metrics.get(name, metrics.get(OTHER_NAMES.get(name, "")))
        text = "" if value is None else layout.format(value) if isinstance(value, int | float) else str(value)
        cells.append(text.rjust(width))
    return "".join(cells)


class ConsoleCallback(TrainerCallback):
    """Prints the table on the main process, when a run goes on, saves and stops, and on a terminal a bar."""

    def __init__(self, stages: StageSeconds | None = None) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.stages = stages
        self.bar: Progress | None = None
        self.heading_printed = False
        self.problems: dict[str, int] = {}  # by name: in how many logged steps in a row
        self.started, self.first_step, self.evaluated = time.monotonic(), 0, 0

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _show(self, doing: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=doing)

    # ---- the run begins, saves, ends

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._close()  # of a run that an error ended
        atexit.register(self._close)  # an interrupted program would leave the terminal without its cursor
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.global_step:
            self._print(f"Going on at step {state.global_step} of {state.max_steps}.")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bar.start()
        self.task = self.bar.add_task("starting", total=state.max_steps, completed=state.global_step)
        if self.stages is not None:
            self.stages.on_change = lambda stage: self._show(STAGES.get(stage, stage))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._print(f"Saved checkpoint-{state.global_step}.")

    def on_train_end(self, args, state, control, **kwargs):
        self._close()
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self._print(f"Stopped at step {state.global_step} of {state.max_steps}.")

    def _close(self) -> None:
        atexit.unregister(self._close)
        if self.bar is not None:
            self.bar.stop()
        self.bar = None
        if self.stages is not None:
            self.stages.on_change = None

    # ---- steps and evaluations

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.evaluated += 1
        self._show(f"evaluating, batch {self.evaluated}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated = 0
        self._show("training")

    def _time_left(self, state: Any) -> str | None:
        done = state.global_step - self.first_step
        if done < 1:
            return None
        seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name for _, _, name, _ in COLUMNS} | set(OTHER_NAMES.values())
        if not state.is_world_process_zero or not logs or not shown & set(logs):
            return
        if not self.heading_printed:
            self._print("\n" + LEGEND + "\n")
            self._print("".join(heading.rjust(width) for heading, width, _, _ in COLUMNS))
            self.heading_printed = True
        self._print(format_row({**logs, "step": state.global_step, "left": self._time_left(state)}))
        if "reward" in logs:
            self._advise(logs, args.max_completion_length)

    def _advise(self, logs: Mapping[str, float], max_completion_length: int) -> None:
        found = advice(logs, max_completion_length)
        self.problems = {name: self.problems.get(name, 0) + 1 for name in found}
        for name, text in found.items():
            if self.problems[name] == ADVISE_AFTER:
                self._print(f"In {ADVISE_AFTER} logged steps in a row {text}")
