"""Detects which methods of a trainer a subclass overrides, and wraps methods for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any


def overridden(trainer: Any, ours: type, *names: str) -> str | None:
    """Returns the reason to log if a subclass of ``ours`` overrides one of these methods, or None."""
    for name in names:
        if getattr(type(trainer), name) is not getattr(ours, name):
            return f"{type(trainer).__name__} overrides {name}"
    return None


@contextmanager
def wrapped_methods(trainer: Any, **wrappers: Callable[..., Any]) -> Iterator[None]:
    """Replaces ``trainer.name(...)`` by ``wrapper(method, ...)`` in this context, for each ``name=wrapper``.

    ``method`` is the method that would have run without the wrapper: TRL's, a subclass's, or one set on the instance.
    """
    with ExitStack() as undo:
        for name, wrapper in wrappers.items():
            undo.callback(_restore, trainer, name, vars(trainer).get(name))
            setattr(trainer, name, partial(wrapper, getattr(trainer, name)))
        yield


def _restore(trainer: Any, name: str, before: Any) -> None:
    """Restores the instance attribute ``name``; ``before`` is None if the instance had none."""
    delattr(trainer, name)
    if before is not None:
        setattr(trainer, name, before)
