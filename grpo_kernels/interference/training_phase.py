"""Computes two statistics over several steps: the phase of training, and the theorem's constant C.

Source: arXiv 2601.23135, Figure 3 and Table 3 (phases), Theorem 3.2 (C).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import torch


class PhaseState(TypedDict):
    """``TrainingPhase.state_dict()``."""

    averages: dict[str, float]
    phase: int | None


class SpeedupState(TypedDict):
    """``SpeedupConstant.state_dict()``."""

    total: float
    steps: int
    outside: bool


@dataclass
class TrainingPhase:
    """Finds the training phase (1, 2 or 3) from moving averages of ``near_orthogonal_frac`` and ``cos_std``.

    It is phase 1 while ``near_orthogonal_frac`` is at least ``near_orthogonal``; else phase 2 while ``cos_std`` is
    below its limit, and phase 3 above it. A run may skip phases and return to earlier ones. The paper's rows (0.977,
    0.045), (0.803, 0.066) and (0.524, 0.130) are phases 1, 2 and 3. (Interpolated between them, the second boundary is
    near step 390; the paper draws it at 300.) A step without ``cos_std``, whose variance is below the sketch's, counts
    as 0.

    Rollout noise shrinks raw cosines, so phases depend on the group size. At a reliability below 0.1 even prompts with
    the same true gradient look near-orthogonal.

    Attributes:
        near_orthogonal, cos_std: the limits.
        hysteresis: to leave a phase, a statistic must pass its limit by this share of ``cos_std``, or of
            ``1 - near_orthogonal``.
        decay: of the moving averages.
        min_reliability: the phase is None while the moving average of ``reliability`` is lower.
        min_prompts: a step with fewer live prompts has no phase, and doesn't enter the averages.
        averages: the moving averages by metric.
        phase: the latest reliable phase, from which hysteresis starts.
    """

    near_orthogonal: float = 0.9
    cos_std: float = 0.1
    hysteresis: float = 0.1
    decay: float = 0.9
    min_reliability: float = 0.1
    min_prompts: int = 4
    averages: dict[str, float] = field(default_factory=dict)
    phase: int | None = None

    def observe(self, metrics: Mapping[str, float]) -> int | None:
        """Returns the phase after a step with these ``interference_metrics``; None if it isn't reliable."""
        if metrics.get("interference/live_prompts", 0) < self.min_prompts:
            return None
        if "interference/reliability" not in metrics:  # the step has one completion per prompt
            return None
        for name in ("near_orthogonal_frac", "cos_std", "reliability"):
            value = metrics.get(f"interference/{name}", 0.0)
            previous = self.averages.get(name, value)
            self.averages[name] = self.decay * previous + (1 - self.decay) * value
        if self.averages["reliability"] < self.min_reliability:
            return None
        self.phase = self._next()
        return self.phase

    def _next(self) -> int:
        leave, back = (1 + self.hysteresis, 1 - self.hysteresis) if self.phase else (1.0, 1.0)
        interfering = 1 - self.averages["near_orthogonal_frac"]
        if interfering <= (1 - self.near_orthogonal) * (leave if self.phase == 1 else back) + 1e-12:
            return 1
        return 3 if self.averages["cos_std"] >= self.cos_std * (back if self.phase == 3 else leave) else 2

    def state_dict(self) -> PhaseState:
        """Returns the state as plain numbers, for JSON."""
        return {"averages": dict(self.averages), "phase": self.phase}

    def load_state_dict(self, state: PhaseState) -> None:
        """Restores the state from what ``state_dict`` returned."""
        self.averages, self.phase = dict(state["averages"]), state["phase"]


@dataclass
class SpeedupConstant:
    """Computes C = 8/3 * the mean of sigma over all steps; sigma of a step is its ``curvature/sigma_mean``.

    Theorem 3.2 predicts faster convergence with normalisation if C is below 1. C is defined for rewards in [0, 1];
    after a reward outside, it is None for the rest of the run.
    """

    total: float = 0.0
    steps: int = 0
    outside: bool = False

    def observe(self, metrics: Mapping[str, float], reward_B: torch.Tensor) -> float | None:
        """Returns C after a step with these ``interference_metrics`` and rewards (B,); None if it isn't defined."""
        self.outside |= bool(((reward_B < 0) | (reward_B > 1)).any())
        if "curvature/sigma_mean" in metrics:
            self.total += metrics["curvature/sigma_mean"]
            self.steps += 1
        return None if self.outside or self.steps == 0 else 8 / 3 * self.total / self.steps

    def state_dict(self) -> SpeedupState:
        """Returns the state as plain numbers, for JSON."""
        return {"total": self.total, "steps": self.steps, "outside": self.outside}

    def load_state_dict(self, state: SpeedupState) -> None:
        """Restores the state from what ``state_dict`` returned."""
        self.total, self.steps, self.outside = float(state["total"]), int(state["steps"]), bool(state["outside"])
