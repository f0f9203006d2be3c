"""What a run has cost by then, in tokens trained, and the budgets.

``price``: what a generated token costs over a trained one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PRICES = (0.5, 1.0, 3.0, 9.0)
STEPS, ANSWERS = 48, 128  # of a budget: what is generated, and half as much is trained
TOKENS = {"mixture": 3.7, "wide": 2.0}  # of an answer, about
TRAINED_SHARE = 0.5


def cost(row: Mapping[str, float], price: float) -> float:
    return price * row["generated"] + row["trained"]


def budget(task: str, price: float) -> float:
    return STEPS * ANSWERS * TOKENS[task] * (price + TRAINED_SHARE)


def reached(task: str, row: Mapping[str, float]) -> bool:
    """Returns whether a run has come to all budgets."""
    return all(cost(row, price) >= budget(task, price) for price in PRICES)


def at_budget(rows: Sequence[Mapping[str, Any]], task: str, price: float, name: str = "accuracy") -> float:
    """Returns what a run had reached when the budget was spent, on straight lines between evaluations."""
    return float(np.interp(budget(task, price), [cost(row, price) for row in rows], [row[name] for row in rows]))


def area(rows: Sequence[Mapping[str, Any]], task: str, price: float) -> float:
    """Returns the mean accuracy from the start until the budget is spent."""
    at = np.linspace(0, budget(task, price), 101)
    return float(np.interp(at, [cost(row, price) for row in rows], [row["accuracy"] for row in rows]).mean())
