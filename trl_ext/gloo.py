"""The end of a run on several processes."""

from __future__ import annotations

import time


def let_gloo_finish(num_processes: int) -> None:
    """Waits until gloo has let go of what it sent last.

    Its worker thread may still hold a tensor of the last exchange, and needs Python's lock to let go of it. Freeing the
    trainer (its DDP reducer) keeps that lock while it waits for the thread: the process hung in one of four runs. So
    the thread gets its turn before anything is freed.
    """
    if num_processes > 1:
        time.sleep(0.5)
