"""Which override of a trainer's method runs: ours, or a subclass's in place of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any


def overridden(trainer: Any, ours: type, *names: str) -> str | None:
    """What to say of the first of these methods that ``trainer``'s class has in place of that of ``ours``, or None."""
    for name in names:
        if getattr(type(trainer), name) is not getattr(ours, name):
            return f"{type(trainer).__name__} has a {name} of its own"
    return None


@contextmanager
def answered_by(trainer: Any, **stand_ins: Callable[..., Any]) -> Iterator[None]:
    """Within, ``trainer.name(...)`` is ``stand_in(method, ...)`` for each of these, ``method`` what would have been
    called: a subclass's, or one that was put on this very trainer."""
    with ExitStack() as undo:
        for name, stand_in in stand_ins.items():
            undo.callback(_put, trainer, name, vars(trainer).get(name))
            setattr(trainer, name, partial(stand_in, getattr(trainer, name)))
        yield


def _put(trainer: Any, name: str, before: Any) -> None:
    """Gives the trainer back what it had under this name."""
    delattr(trainer, name)
    if before is not None:
        setattr(trainer, name, before)
