"""Describes one normalisation: its formula, its source, its options, and which statistics or function compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Option:
    """The range of an option, and its default (None: required).

    The range is ``low <= x <= high``, without ``low`` if ``open_start`` and without ``high`` if ``open_end``.
    ``whole``: whole numbers only.
    """

    low: float
    high: float
    default: float | None = None
    open_end: bool = False
    open_start: bool = False
    whole: bool = False

    def allows(self, value: object) -> bool:
        """Returns whether ``value`` is a number in the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        at_open_end = (self.open_start and value == self.low) or (self.open_end and value == self.high)
        return self.low <= value <= self.high and not at_open_end

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} in {'(' if self.open_start else '['}{self.low:g}, {self.high:g}{')' if self.open_end else ']'}"


@dataclass(frozen=True)
class Groups:
    """What a method that is a function gets: the groups' rewards in float64 and their statistics.

    Attributes:
        rewards: (P, G), NaN where unscorable.
        count, mean, std: (P, 1) of each group's scorable rewards, std with ddof=1; 0 without any.
        eps: to be added to a scale in units of reward.
        options: the method's own options, defaults included.
        context: as for ``normalize_rewards``.
    """

    rewards: torch.Tensor
    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    eps: float
    options: Mapping[str, Any]
    context: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One normalisation.

    Attributes:
        centre: zero, group (mean), median, lengths (length-weighted mean), or given (computed before the pass over the
            groups).
        scale: one, group (std), others (leave one out), power, mean_abs, mad, iqr, mean, given, or rank (not affine: r
            becomes its mid-rank).
        kind: what it depends on: "group", its own group; "batch", the batch; "state", earlier steps, by ``context``.
        formula, source: for documentation.
        options: its options besides ``eps`` and ``SHARED_OPTIONS``.
        needs: required entries of ``context``.
        unit_rewards: whether rewards must be in [0, 1].
        zero_if_equal: whether a group of equal rewards gets advantage 0.
        function: computes the advantages (P, G) in plain torch, in place of ``centre`` and ``scale``. Unscorable
            completions are set to 0 afterwards, and groups of equal rewards if ``zero_if_equal``.
    """

    centre: str
    scale: str
    kind: str
    formula: str
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    unit_rewards: bool = False
    zero_if_equal: bool = True
    function: Callable[[Groups], torch.Tensor] | None = None

    @property
    def own_group(self) -> bool:
        """Whether a group's advantages depend only on its rewards, so that ``linear_grpo_loss`` can compute them."""
        return self.kind == "group" and self.scale != "rank" and not self.needs and self.function is None
