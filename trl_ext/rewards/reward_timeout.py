"""A reward function that hangs is named and ends, after ``reward_timeout`` seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

GRACE = 10  # seconds a function has to be interrupted in, or the process ends


class TookTooLong(Exception):  # noqa: N818
    """With function and prompt named."""


class _Expired(BaseException):
    """Not an ``Exception``: a reward function that catches those would go on."""


def call_limited(function: Callable, seconds: float, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``function(*args, **kwargs)``; ``TookTooLong`` after ``seconds``, naming function and prompt.

    In the main thread a signal (SIGUSR2) interrupts it, also where it sleeps or waits for a socket. Elsewhere, and
    where there is no such signal, it is left behind in a thread of its own. What can't be interrupted for another
    ``GRACE`` seconds, a computation in C, ends the process.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR2"):
        return _Interrupted(seconds, name, kwargs)(function, args, kwargs)
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function(*args, **kwargs))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not result:
        raise TookTooLong(_text(seconds, name, kwargs, None))
    return result[0]


async def await_limited(function: Callable, seconds: float, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The same of a coroutine function. One that never awaits ends the process, after ``GRACE`` seconds more."""
    text = _text(seconds, name, kwargs, None)
    end = threading.Timer(seconds + GRACE, _end_process, (text,))
    end.daemon = True
    end.start()
    try:
        return await asyncio.wait_for(function(*args, **kwargs), seconds)
    except TimeoutError:
        raise TookTooLong(text) from None
    finally:
        end.cancel()


class _Interrupted:
    """One call, watched by a thread that sends the signal."""

    def __init__(self, seconds: float, name: str, kwargs: dict[str, Any]) -> None:
        self.seconds, self.name, self.kwargs = seconds, name, kwargs
        self.inside, self.expired, self.done = False, False, threading.Event()
        self.row: int | None = None
        self.thread = threading.get_ident()

    def __call__(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.previous = signal.signal(signal.SIGUSR2, self._on_signal)
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        result = None
        try:
            try:
                self.inside = True
                result = function(*args, **kwargs)
            finally:
                self.inside = False
        except _Expired:
            pass
        finally:
            self.done.set()
            watch.join()
            signal.signal(signal.SIGUSR2, self.previous)
        if self.expired:
            raise TookTooLong(_text(self.seconds, self.name, self.kwargs, self.row))
        return result

    def _watch(self) -> None:
        if self.done.wait(self.seconds):
            return
        self.expired = True
        for _ in range(GRACE):  # again, where the function has caught it
            signal.pthread_kill(self.thread, signal.SIGUSR2)
            if self.done.wait(1):
                return
        _end_process(_text(self.seconds, self.name, self.kwargs, self.row))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.expired:
            if callable(self.previous):  # somebody else's
                self.previous(number, frame)
        elif self.inside:
            if self.row is None:
                self.row = _row_in_hand(frame, self.kwargs)
            raise _Expired


def _row_in_hand(frame: FrameType | None, kwargs: dict[str, Any]) -> int | None:
    """Which completion or prompt the interrupted code, or who called it, holds in a variable."""
    for name in ("completions", "prompts"):
        rows = {id(value): row for row, value in reversed(list(enumerate(kwargs.get(name) or [])))}
        looked_at = frame
        while looked_at is not None and looked_at.f_code is not _Interrupted.__call__.__code__:
            for value in looked_at.f_locals.values():
                if id(value) in rows:
                    return rows[id(value)]
            looked_at = looked_at.f_back
    return None


def _text(seconds: float, name: str, kwargs: dict[str, Any], row: int | None) -> str:
    prompts: Sequence[Any] = kwargs.get("prompts") or []
    text = f"reward function {name!r} took more than {seconds:g} s (reward_timeout)"
    if row is not None and row < len(prompts):
        return f"{text}, at completion {row} of {len(prompts)}, of the prompt {prompts[row]!r:.300}"
    if prompts:
        return f"{text}, at one of {len(prompts)} completions, the first of the prompt {prompts[0]!r:.300}"
    return text


def _end_process(text: str) -> None:
    os.write(2, f"\n{text}; it can't be interrupted: this process ends.\n".encode(errors="replace"))
    os._exit(1)
