"""A reward function that fails says which one it was, and where."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from trl_ext.trl_surface import get_callable_name, is_async_callable


def _fail(name: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"reward function {name!r} raised {type(error).__name__}: {error}")


def _check(name: str, rewards: Any, completions: list | None) -> Any:
    """Returns ``rewards``; raises ``ValueError`` unless it holds one finite number, NaN or None per completion.

    ``completions`` None: called without, as an environment's own reward may be; their number isn't known then.
    """
    try:
        count = len(rewards)
    except TypeError:
        expected = "rewards" if completions is None else f"{len(completions)} rewards"
        raise ValueError(
            f"reward function {name!r} returned {type(rewards).__name__}, not a list of {expected}"
        ) from None
    if completions is not None and count != len(completions):
        raise ValueError(f"reward function {name!r} returned {count} rewards for {len(completions)} completions")
    for row, reward in enumerate(rewards):
        if reward is None:
            continue
        try:
            value = float(reward)
        except (TypeError, ValueError):
            raise ValueError(f"reward function {name!r} returned {reward!r} for row {row}, not a number") from None
        if math.isinf(value):
            of = "" if completions is None else f" (completion: {completions[row]!r:.200})"
            raise ValueError(
                f"reward function {name!r} returned {value} for row {row}{of}: "
                "rewards must be finite, or None for a completion that can't be scored"
            )
    return rewards


def checked_reward(function: Callable, name: str | None = None) -> Callable:
    """``function`` with its name in every error, and its result checked. Models are returned as they are.

    An exception inside becomes a ``RuntimeError`` naming the function, with the original as its cause. A result that
    isn't one finite number (or None) per completion is a ``ValueError`` naming the function and the row.
    """
    if isinstance(function, nn.Module):
        return function
    name = name or get_callable_name(function)

    if is_async_callable(function):

        async def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                rewards = await function(*args, **kwargs)
            except Exception as error:
                raise _fail(name, error) from error
            return _check(name, rewards, kwargs.get("completions"))

    else:

        def checked(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
            try:
                rewards = function(*args, **kwargs)
            except Exception as error:
                raise _fail(name, error) from error
            return _check(name, rewards, kwargs.get("completions"))

    functools.update_wrapper(checked, function)
    checked.__name__ = name  # a callable object has none of its own
    return checked
