"""Decorates the head's autograd Functions: they run without autocast, and have no second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disables autocast inside ``function``, so that sums stay in float32; the products' dtype is chosen before."""

    @functools.wraps(function)
    def wrapper(ctx: Any, *arguments: Any) -> Any:
        # there is no tensor if no output has an upstream gradient
        kinds = {argument.device.type for argument in arguments if isinstance(argument, torch.Tensor)}
        with torch.autocast(kinds.pop() if kinds else "cpu", enabled=False):
            return function(ctx, *arguments)

    return wrapper


def once_differentiated(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Disables autocast inside ``backward``, and raises ``RuntimeError`` if second derivatives are requested.

    ``once_differentiable`` alone raises no error as long as no upstream gradient requires a gradient itself.
    """
    once = once_differentiable(without_autocast(backward))

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        refuse_second_derivatives()
        return once(ctx, *gradients)

    return checked


def refuse_second_derivatives() -> None:
    """Raises ``RuntimeError`` in a backward that records a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError("the head's loss and log-probs have no second derivatives: create_graph=True can't be used")
