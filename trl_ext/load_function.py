"""Imports a function that a command line names, such as ``--reward my_rewards:score``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def load_function(place: str, option: str) -> Callable[..., Any]:
    """Returns the function ``module:name``. The module may be in the current folder.

    Args:
        place: ``module:name``.
        option: the command-line option that ``place`` was given by, for error messages.

    Raises:
        ValueError: ``place`` has another form, its module can't be imported, or it isn't a function.
    """
    module_name, colon, name = place.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{option} {place!r} must be module:name")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing a module may raise anything
        raise ValueError(f"{option} {place}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ValueError(f"{option} {place} is not a function")

    return function
