"""Checks the results of reward functions: an error names the function and the row, and stops all ranks together."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import nn

LARGEST = torch.finfo(torch.float32).max  # rewards are gathered in float32, where a larger one is infinite
CHECKED = "_curvature_grpo_checked"  # attribute of a reward function that is wrapped already


class RewardFailed(Exception):  # noqa: N818
    """A reward function failed on some rank. It is raised on every rank."""


class RewardRaised(RewardFailed, RuntimeError):  # noqa: N818
    """A reward function raised an exception, which is the cause of this one."""


class WrongRewards(RewardFailed, ValueError):  # noqa: N818
    """A reward function didn't return one finite number, NaN or None for each completion."""


class RewardFailures:
    """Keeps a failure on this rank until all ranks have gathered their rewards, then raises it on all of them.

    If one rank raised at once, the others would wait for it in the next collective. With one rank it raises at once.
    """

    def __init__(self, processes: int) -> None:
        self._several = processes > 1
        self._error: RewardFailed | None = None

    def keep(self, error: RewardFailed, completions: list | None) -> list[float]:
        """Keeps the error and returns NaN rewards in place of the function's. With one rank it raises the error."""
        if not self._several or completions is None:
            raise error
        self._error = self._error or error
        return [math.nan] * len(completions)

    def raise_on_all_ranks(self, process_index: int) -> None:
        """Raises a kept failure of any rank on all ranks. All ranks must call it, after gathering rewards."""
        if not self._several:
            return
        error, self._error = self._error, None
        if not gather(torch.tensor([error is not None], device=PartialState().device)).any():
            return
        own = None if error is None else (type(error), f"process {process_index}: {error}")
        first = next((failure for failure in gather_object([own]) if failure is not None), None)
        if first is not None:
            raise first[0](first[1]) from error


def _check(name: str, rewards: Any, completions: list | None) -> Any:
    """Returns ``rewards``; raises ``WrongRewards`` unless it holds one finite number, NaN or None per completion.

    ``completions`` is None if the function was called without them, as an environment's reward may be; then the number
    of rewards isn't checked.
    """
    try:
        count = len(rewards)
    except TypeError:
        expected = "rewards" if completions is None else f"{len(completions)} rewards"
        raise WrongRewards(
            f"reward function {name!r} returned {type(rewards).__name__}, not a list of {expected}"
        ) from None
    if completions is not None and count != len(completions):
        raise WrongRewards(f"reward function {name!r} returned {count} rewards for {len(completions)} completions")
    for row, reward in enumerate(rewards):
        if reward is None:
            continue
        try:
            if isinstance(reward, str | bytes):  # float("1.0") would accept it
                raise TypeError
            value = float(reward)
        except (TypeError, ValueError):
            raise WrongRewards(f"reward function {name!r} returned {reward!r} for row {row}, not a number") from None
        if abs(value) > LARGEST:
            of = "" if completions is None else f" (completion: {completions[row]!r:.200})"
            raise WrongRewards(
                f"reward function {name!r} returned {value} for row {row}{of}: "
                "rewards must be finite, or None for a completion that can't be scored"
            )
    return rewards


def _list_of(rewards: Any) -> Any:
    """Returns a list of what can only be iterated (``map``, a generator); anything else unchanged."""
    iterates = hasattr(rewards, "__iter__") or hasattr(rewards, "__getitem__")
    return list(rewards) if iterates and not hasattr(rewards, "__len__") else rewards


def _innermost(function: Callable) -> Any:
    """Returns the function that nested ``functools.partial`` objects call."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_async(function: Callable) -> bool:
    """Whether calling ``function`` returns a coroutine: an ``async def``, or an object whose ``__call__`` is one."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def checked_reward(function: Callable, name: str | None = None, failures: RewardFailures | None = None) -> Callable:
    """Wraps a reward function so that its result is checked and errors name it. Returns reward models unchanged.

    The wrapper raises ``RewardRaised`` (a ``RuntimeError``) if the function raises, and ``WrongRewards`` (a
    ``ValueError``, which names the row) unless it returns one finite number, NaN or None per completion.
    """
    if isinstance(function, nn.Module):
        return function
    if getattr(function, CHECKED, False):
        return function
    called = _innermost(function)
    name = str(name or getattr(called, "__name__", type(called).__name__))  # as TRL names it
    failures = failures or RewardFailures(1)

    def checked_result(outcome: Any, completions: list | None) -> Any:
        """Returns the rewards; ``outcome`` is the function's result, or the exception that it raised."""
        try:
            if isinstance(outcome, Exception):
                raise RewardRaised(f"reward function {name!r} raised {type(outcome).__name__}: {outcome}") from outcome
            return _check(name, outcome, completions)
        except RewardFailed as failure:
            return failures.keep(failure, completions)

    if _is_async(called):

        async def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                outcome = _list_of(await function(*args, **kwargs))
            except Exception as error:
                outcome = error
            return checked_result(outcome, kwargs.get("completions"))

    else:

        def checked(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
            try:
                outcome = _list_of(function(*args, **kwargs))
            except Exception as error:
                outcome = error
            return checked_result(outcome, kwargs.get("completions"))

    functools.update_wrapper(checked, function)
    checked.__name__ = name  # a callable object has no __name__
    setattr(checked, CHECKED, True)
    return checked


def warn_if_unscored(rewards_BF: torch.Tensor, names: Sequence[str], log_once: Callable[[str], None]) -> None:
    """Warns once if no function scored any completion of a batch: it has no gradient. ``rewards_BF``: of all ranks."""
    if rewards_BF.isnan().all():
        functions = ", ".join(map(repr, names))
        log_once(
            f"No completion of a batch was scored: {functions} returned None or NaN for each of the "
            f"{len(rewards_BF)}. Such a batch has no gradient."
        )


def checked_rewards(functions: Sequence[Callable], names: Sequence[str], failures: RewardFailures) -> list[Callable]:
    """Wraps each function by ``checked_reward``. Missing names are left to TRL, which raises an error for them."""
    pairs = itertools.zip_longest(functions, names[: len(functions)])
    return [checked_reward(function, name, failures) for function, name in pairs]
