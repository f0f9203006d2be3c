"""Whose method is heard: ours, a subclass's in place of it, or TRL's where our ``__init__`` never ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


def ours(method: Method) -> Method:
    """Marks a method of ``CurvatureGRPOTrainer`` that overrides one of ``GRPOTrainer``.

    A trainer without ``is_set_up``, as ``object.__new__`` makes it, answers with its parent's.
    """
    return cast(Method, _Ours(method))


class _Ours:
    """Puts ``method`` in the class, once that is known."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __set_name__(self, owner: type, name: str) -> None:
        method = self.method

        @wraps(method)
        def ours_or_parents(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if "is_set_up" in vars(trainer):
                return method(trainer, *args, **kwargs)
            return getattr(super(owner, trainer), name)(*args, **kwargs)

        ours_or_parents._is_ours = True  # type: ignore[attr-defined]
        setattr(owner, name, ours_or_parents)


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
