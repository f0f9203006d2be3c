"""Ends a process that torchrun restarted, with an error, unless it finds the other processes within a minute.

torch waits up to half an hour for processes that can't find each other (seen over gloo, where a restart finds addresses
of processes that are gone), and torchrun restarts only what has ended. A shorter timeout of the process group can't
take the place of this timer: transformers passes none on CPUs, where the problem was seen, and a group's timeout is
that of every later exchange too, where ranks may wait longer than a minute for one whose answers are long.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 60.0
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # torchrun then makes a new store for each restart
CODE = 75  # EX_TEMPFAIL: try again


def restarts() -> int:
    """How often torchrun has restarted this process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def lacks_own_store() -> bool:
    """Whether a restart by torchrun would find the store of the processes that are gone."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and os.environ.get(OWN_STORE) != "1"


@contextmanager
def rejoined_in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Wraps the rendezvous of all processes. In a restart, a process that takes longer ends with exit code ``CODE``."""
    if not restarts():
        yield
        return

    def give_up() -> None:
        hint = f": set {OWN_STORE}=1 for torchrun" if lacks_own_store() else ""
        text = f"error: restart {restarts()} found no way back to the other processes in {seconds:.0f} s{hint}\n"
        os.write(sys.stderr.fileno(), text.encode())
        os._exit(CODE)  # the main thread waits inside torch

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
