"""What a run shows while it goes: a progress bar and one readable line of metrics per logged step."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

# heading, width, the trainer's metric, format
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
    "reward, accuracy: of the sampled answers. held-out: accuracy on problems never trained on. zero-var: share of\n"
    "prompts whose answers all got the same reward, so that nothing can be learned from them: they aren't run, and\n"
    "entropy is of the others.\n"
    "loss is about 0 by construction, and no sign of trouble: on policy every ratio is 1, and it is the mean of the\n"
    "advantages, weighed by length, which sum to 0 in a group. Its gradient isn't 0: watch reward and grad."
)

AGAIN = 2  # logged steps in a row, before advice is given


def advice(metrics: Mapping[str, float | None], max_completion_length: int) -> dict[str, str]:
    """Returns reasons why nothing can be learned in this logged step, each with what to change."""
    found = {}
    if metrics.get("completions/clipped_ratio") == 1:
        found["cut"] = (
            f"every answer was cut at max_completion_length={max_completion_length} before it ended, so that none is "
            "whole. Raise --max_completion_length, or ask for shorter answers (--instruction)."
        )
    if metrics.get("accuracy") == 0:
        found["wrong"] = (
            "every answer was wrong: all groups are equal, and nothing can be learned from them. Take easier questions "
            "(--dataset, --levels), a stronger model (--model_name_or_path), more answers a prompt "
            "(--num_generations); or the model doesn't see what is asked: --log_completions true shows its answers, "
            "--prompt_style and --instruction change the question."
        )
    return found


def format_row(metrics: dict[str, float | None]) -> str:
    """Formats one line of the table; a missing metric leaves its cell empty."""
    cells = []
    for _, width, name, layout in COLUMNS:
        value = metrics.get(name, metrics.get(f"{name}_live"))
        cells.append((layout.format(float(value)) if value is not None else "").rjust(width))
    return "".join(cells)


class ConsoleCallback(TrainerCallback):
    """A progress bar (in a terminal) and the table, on the main process. Held-out accuracy gets a line of its own."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.headed = False
        self.troubles: dict[str, int] = {}  # of how many logged steps in a row

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
        known = {name for _, _, name, _ in COLUMNS}
        if not state.is_world_process_zero or not logs or not known & set(logs):
            return
        if not self.headed:
            self._print("\n" + LEGEND + "\n")
            self._print("".join(heading.rjust(width) for heading, width, _, _ in COLUMNS))
            self.headed = True
        self._print(format_row({**logs, "step": state.global_step}))
        if "reward" in logs:
            found = advice(logs, args.max_completion_length)
            self.troubles = {name: self.troubles.get(name, 0) + 1 for name in found}
            for name, text in found.items():
                if self.troubles[name] == AGAIN:
                    self._print(f"In {AGAIN} logged steps {text}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
