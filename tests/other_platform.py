"""Runs tests as on Windows or macOS: ``python tests/other_platform.py PYTEST-ARGUMENTS``.

What only Linux has is taken away once the libraries that look for it at import are there: Triton, fork, and signals
that Windows lacks. Files are read and written in an encoding that isn't UTF-8 unless one is named.
"""

from __future__ import annotations

import builtins
import io
import multiprocessing
import os
import pkgutil
import signal
import sys

import pytest

os.environ["TRITON_INTERPRET"] = "0"

ENCODING = "cp1252"
ABSENT = ("triton", "fcntl", "resource", "termios", "pwd", "grp")
NOT_OF_WINDOWS = ("SIGALRM", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "setitimer", "alarm", "pthread_kill")


class Absent:
    """Refuses to import what isn't there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def pretend() -> None:
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import trl.trainer.grpo_trainer  # noqa: F401

    for name in [module for module in sys.modules if module.split(".")[0] in ABSENT]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent)
    for name in ("fork", "forkpty", "killpg", "geteuid", "setsid", "mkfifo", "uname", "sched_getaffinity"):
        if hasattr(os, name):
            delattr(os, name)
    for name in NOT_OF_WINDOWS:
        delattr(signal, name)
    multiprocessing.set_start_method("spawn", force=True)
    io.text_encoding = lambda encoding, stacklevel=2: encoding or ENCODING
    original = builtins.open

    def windows_open(file, mode="r", buffering=-1, encoding=None, *rest, **named):
        return original(file, mode, buffering, encoding if "b" in mode else encoding or ENCODING, *rest, **named)

    builtins.open = windows_open


if __name__ == "__main__":
    pretend()
    for package in ("grpo_kernels", "trl_ext"):
        for module in pkgutil.walk_packages(__import__(package).__path__, f"{package}."):
            if not module.name.split(".")[-1].startswith(("triton_", "__main__")):
                __import__(module.name)
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
