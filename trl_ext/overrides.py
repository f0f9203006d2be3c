"""Which methods of ours a subclass has replaced: its own is heard, or what we do around it would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def ours(method: Method) -> Method:
    """Marks a method of ``CurvatureGRPOTrainer`` that overrides one of ``GRPOTrainer``."""
    method._is_ours = True  # type: ignore[attr-defined]
    return method


def overridden(trainer: Any, *names: str) -> str | None:
    """What to say of the first of these methods that ``trainer``'s class has in place of ours, or None."""
    for name in names:
        if not getattr(getattr(type(trainer), name), "_is_ours", False):
            return f"{type(trainer).__name__} has a {name} of its own"
    return None


@contextmanager
def answered_by(trainer: Any, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Within, ``trainer.name(...)`` is ``stand_in(method, ...)``, ``method`` what would have been called: a subclass's,
    or one that was put on this very trainer."""
    put_there = vars(trainer).get(name)
    setattr(trainer, name, partial(stand_in, getattr(trainer, name)))
    try:
        yield
    finally:
        delattr(trainer, name)
        if put_there is not None:
            setattr(trainer, name, put_there)
