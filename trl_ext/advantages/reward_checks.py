"""A reward function that fails says which one it was, and where; and all processes stop together."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import nn

from trl_ext.compat import get_callable_name, is_async_callable

LARGEST = torch.finfo(torch.float32).max  # rewards are gathered in float32, in which more is infinite
CHECKED = "_curvature_grpo_checked"  # of a function that is checked already


class RewardFailed(Exception):  # noqa: N818
    """A reward function raised, or returned what can't be used: on every process."""


class RewardRaised(RewardFailed, RuntimeError):  # noqa: N818
    """With what it raised as its cause."""


class WrongRewards(RewardFailed, ValueError):  # noqa: N818
    """Not one finite number, NaN or None for each completion."""


class RewardFailures:
    """With several processes: what failed on this one waits until it is told on all, who would wait for it else."""

    def __init__(self, processes: int) -> None:
        self._waits = processes > 1
        self._error: RewardFailed | None = None

    def keep(self, error: RewardFailed, completions: list | None) -> list[float]:
        """Raises the error, or keeps it and returns rewards in place of the function's."""
        if not self._waits or completions is None:
            raise error
        self._error = self._error or error
        return [math.nan] * len(completions)

    def raise_together(self, process_index: int) -> None:
        """On all processes, once the rewards were gathered."""
        if not self._waits:
            return
        error, self._error = self._error, None
        if not gather(torch.tensor([error is not None], device=PartialState().device)).any():
            return
        told = None if error is None else (type(error), f"process {process_index}: {error}")
        found = next((one for one in gather_object([told]) if one is not None), None)
        if found is not None:
            raise found[0](found[1]) from error


def _check(name: str, rewards: Any, completions: list | None) -> Any:
    """Returns ``rewards``; raises ``WrongRewards`` unless it holds one finite number, NaN or None per completion.

    ``completions`` None: called without, as an environment's own reward may be; their number isn't known then.
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
            if isinstance(reward, str | bytes):  # float("1.0") is a number
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
    """What can only be iterated (``map``, a generator, an object of the user's) as a list; anything else as it is."""
    iterates = hasattr(rewards, "__iter__") or hasattr(rewards, "__getitem__")
    return list(rewards) if iterates and not hasattr(rewards, "__len__") else rewards


def checked_reward(
    function: Callable,
    name: str | None = None,
    failures: RewardFailures | None = None,
) -> Callable:
    """``function`` with its name in every error, and its result checked. Models are returned as they are.

    An exception inside becomes a ``RewardRaised`` (a ``RuntimeError``), with the original as its cause. A result that
    isn't one finite number (or None) per completion is a ``WrongRewards`` (a ``ValueError``) naming the row.
    """
    if isinstance(function, nn.Module):
        return function
    if getattr(function, CHECKED, False):
        return function
    name = name or get_callable_name(function)
    failures = failures or RewardFailures(1)

    def judged(rewards: Any, error: Exception | None, completions: list | None) -> Any:
        try:
            if error is not None:
                raise RewardRaised(f"reward function {name!r} raised {type(error).__name__}: {error}") from error
            return _check(name, rewards, completions)
        except RewardFailed as failure:
            return failures.keep(failure, completions)

    if is_async_callable(function):

        async def checked(*args: Any, **kwargs: Any) -> Any:
            rewards, failed = None, None
            try:
                rewards = _list_of(await function(*args, **kwargs))
            except Exception as error:
                failed = error
            return judged(rewards, failed, kwargs.get("completions"))

    else:

        def checked(*args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]
            rewards, failed = None, None
            try:
                rewards = _list_of(function(*args, **kwargs))
            except Exception as error:
                failed = error
            return judged(rewards, failed, kwargs.get("completions"))

    functools.update_wrapper(checked, function)
    checked.__name__ = name  # a callable object has none of its own
    setattr(checked, CHECKED, True)
    return checked


def say_if_unscored(rewards_BF: torch.Tensor, names: Sequence[str], say_once: Callable[[str], None]) -> None:
    """``rewards_BF`` (B, F) of all processes: where no function scored any completion, no step can learn anything."""
    if rewards_BF.isnan().all():
        functions = ", ".join(map(repr, names))
        say_once(
            f"No completion of a batch was scored: {functions} returned None or NaN for each of the "
            f"{len(rewards_BF)}. Such a batch has no gradient."
        )


def checked_rewards(functions: Sequence[Callable], names: Sequence[str], failures: RewardFailures) -> list[Callable]:
    """``checked_reward`` of each; those that are checked already stay. TRL objects where ``names`` are fewer."""
    pairs = itertools.zip_longest(functions, names[: len(functions)])
    return [checked_reward(one, name, failures) for one, name in pairs]
