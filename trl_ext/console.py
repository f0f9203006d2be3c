"""Prints a run's progress: a progress bar, and one line of metrics per logged step."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

# heading, width, name of the trainer's metric, format
COLUMNS = (
    ("step", 5, "step", "{:.0f}"),
    ("reward", 7, "reward", "{:.3f}"),
    ("accuracy", 9, "accuracy", "{:.3f}"),
    ("held-out", 9, "eval_accuracy", "{:.3f}"),
    ("zero-var", 9, "normalization/zero_variance_frac", "{:.2f}"),
    ("entropy", 8, "entropy", "{:.3f}"),
    ("tokens", 7, "completions/mean_length", "{:.1f}"),
    ("grad", 8, "grad_norm", "{:.3f}"),
    ("loss", 8, "loss", "{:.4f}"),
    ("s/step", 7, "step_time", "{:.2f}"),
)
LEGEND = (
    "reward, accuracy: of the sampled answers. held-out: accuracy on problems that aren't trained on. zero-var: share\n"
    "of prompts whose answers all have the same reward. They have no gradient and aren't run; entropy is of the rest.\n"
    "A loss of about 0 is expected: on policy every ratio is 1, so the loss is the mean of the advantages, weighted\n"
    "by length, which sum to 0 in a group. Its gradient isn't 0: watch reward and grad."
)

ADVISE_AFTER = 2  # logged steps in a row with the same problem


def advice(metrics: Mapping[str, float | None], max_completion_length: int) -> dict[str, str]:
    """Returns the reasons why this logged step has no gradient, by name, each with advice on what to change."""
    found = {}
    if metrics.get("completions/clipped_ratio") == 1:
        found["cut"] = (
            f"every answer was cut at max_completion_length={max_completion_length} before it ended. "
            "Raise --max_completion_length, or ask for shorter answers (--instruction)."
        )
    if metrics.get("accuracy") == 0:
        found["wrong"] = (
            "every answer was wrong, so no group has a gradient. Take easier questions (--dataset, --levels), a "
            "stronger model (--model_name_or_path), or more answers per prompt (--num_generations). Or the model "
            "misunderstands the question: --log_completions true shows its answers, --prompt_style and --instruction "
            "change the prompt."
        )
    return found


def format_row(metrics: dict[str, float | None]) -> str:
    """Returns one line of the table; the cell of a missing metric is empty."""
    cells = []
    for _, width, name, layout in COLUMNS:
        value = metrics.get(name, metrics.get(f"{name}_live"))
        cells.append((layout.format(float(value)) if value is not None else "").rjust(width))
    return "".join(cells)


class ConsoleCallback(TrainerCallback):
    """Prints a progress bar (in a terminal) and the table on the main process. An evaluation gets its own line."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.heading_printed = False
        self.problems: dict[str, int] = {}  # by name: in how many logged steps in a row

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.progress.start()
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name for _, _, name, _ in COLUMNS}
        if not state.is_world_process_zero or not logs or not shown & set(logs):
            return
        if not self.heading_printed:
            self._print("\n" + LEGEND + "\n")
            self._print("".join(heading.rjust(width) for heading, width, _, _ in COLUMNS))
            self.heading_printed = True
        self._print(format_row({**logs, "step": state.global_step}))
        if "reward" in logs:
            found = advice(logs, args.max_completion_length)
            self.problems = {name: self.problems.get(name, 0) + 1 for name in found}
            for name, text in found.items():
                if self.problems[name] == ADVISE_AFTER:
                    self._print(f"In {ADVISE_AFTER} logged steps {text}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
