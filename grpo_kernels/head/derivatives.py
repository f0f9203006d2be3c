"""What both autograd Functions of the head hold to: a precision of their own, and first derivatives alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def own_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """No autocast inside: sums stay in float32 whatever mode is around (products choose their dtype before)."""

    @functools.wraps(function)
    def inside(ctx: Any, *arguments: Any) -> Any:
        kinds = {one.device.type for one in arguments if isinstance(one, torch.Tensor)}  # empty: no upstream gradient
        with torch.autocast(kinds.pop() if kinds else "cpu", enabled=False):
            return function(ctx, *arguments)

    return inside


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``own_precision`` of a backward that has none itself. ``RuntimeError`` where a graph of it is asked for, which
    ``once_differentiable`` alone leaves unsaid while no upstream gradient needs one."""
    once = once_differentiable(own_precision(backward))

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the head's loss and log-probs have no second derivatives: create_graph=True can't be used"
            )
        return once(ctx, *gradients)

    return checked
