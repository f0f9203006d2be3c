"""How far an ablation is: bars in a terminal, elsewhere a line every ``EVERY`` seconds."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

EVERY = 15  # seconds between two lines


class AblationProgress:
    """A bar of the runs, and one of each policy or run that a worker is at. Called from several threads."""

    def __init__(self, total: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bars.start()
        self.all = self.bars.add_task("runs", total=total)
        self.at: dict[str, TaskID] = {}
        self.steps: dict[str, tuple[int, int]] = {}
        self.said = time.monotonic()
        self.lock = threading.Lock()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.said = time.monotonic()
        self.console.print(text, markup=False)

    def runs(self, done: int) -> None:
        self.bars.update(self.all, completed=done)

    def begin(self, name: str) -> None:
        with self.lock:
            self.at[name] = self.bars.add_task(f"  {name}", total=None)

    def tell(self, name: str, step: int, steps: int) -> None:
        """A worker is at this step."""
        with self.lock:
            if name not in self.at:  # it has ended
                return
            self.bars.update(self.at[name], completed=step, total=steps)
            self.steps[name] = (step, steps)
            told = ", ".join(f"{one} at step {at} of {of}" for one, (at, of) in self.steps.items())
        if not self.console.is_terminal and time.monotonic() - self.said > EVERY:
            self.say(f"  {told}")

    def end(self, name: str) -> None:
        with self.lock:
            self.bars.remove_task(self.at.pop(name))
            self.steps.pop(name, None)

    def close(self) -> None:
        self.bars.stop()
