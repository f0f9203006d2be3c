"""Ends a restarted process with an error if its rendezvous with the other ranks takes longer than a minute.

After a restart by torchrun, torch waits up to half an hour for ranks that can't find each other (seen with gloo, where
a restarted rank reads the addresses of dead processes). torchrun restarts only processes that have ended.

A shorter timeout of the process group doesn't replace this timer. On CPUs, where the problem was seen, transformers
passes no timeout. And the group's timeout also applies to every later collective, where ranks may wait longer than a
minute for one that generates long answers.
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
    """Returns how often torchrun has restarted this process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def lacks_own_store() -> bool:
    """Returns whether a rank restarted by torchrun would read the store of the dead processes."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and os.environ.get(OWN_STORE) != "1"


@contextmanager
def rendezvous_deadline(seconds: float = SECONDS) -> Iterator[None]:
    """Limits the time of the rendezvous inside it: a restarted process that takes longer exits with ``CODE``."""
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
