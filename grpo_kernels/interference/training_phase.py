"""Which phase of training a run is in, and whether normalising is predicted to pay: what looks across steps.

arXiv 2601.23135: Figure 3 and Table 3 (phases), Theorem 3.2 (the constant C).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class TrainingPhase:
    """Phase 1, 2 or 3 from moving averages of ``near_orthogonal_frac`` and ``cos_std``, with hysteresis.

    1 while ``near_orthogonal_frac`` is at least ``near_orthogonal``, whatever the std; else 2 while ``cos_std`` is
    below ``cos_std``, and 3 from there on. Phases may be skipped, and may go back. The paper's rows (0.977, 0.045),
    (0.803, 0.066) and (0.524, 0.130) are phases 1, 2 and 3 (interpolated between them the second boundary lies near
    its step 390; it draws it at 300). To leave a phase a statistic must pass its threshold by a share ``hysteresis``
    of it: of ``cos_std``, and of ``1 - near_orthogonal``. A step without ``cos_std`` (its variance is below the
    sketch's) counts as 0.

    Raw cosines shrink with rollout noise, so phases depend on the group size, and mean little at low reliability:
    below 0.1 even prompts of one true gradient look near-orthogonal. So there is no phase (None) where the moving
    average of the reliability is below ``min_reliability``, nor at a step of fewer than ``min_prompts`` live prompts,
    which isn't averaged either.
    """

    def __init__(
        self,
        *,
        near_orthogonal: float = 0.9,
        cos_std: float = 0.1,
        hysteresis: float = 0.1,
        decay: float = 0.9,
        min_reliability: float = 0.1,
        min_prompts: int = 4,
    ) -> None:
        for name, value in (("near_orthogonal", near_orthogonal), ("hysteresis", hysteresis), ("decay", decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must be in [0, 1)")
        if not cos_std > 0:
            raise ValueError(f"cos_std={cos_std!r} must be positive")
        if min_prompts < 2:
            raise ValueError(f"min_prompts={min_prompts!r} must be at least 2: one prompt has no pair")
        self.near_orthogonal, self.cos_std, self.hysteresis, self.decay = near_orthogonal, cos_std, hysteresis, decay
        self.min_reliability, self.min_prompts = min_reliability, min_prompts
        self.averages: dict[str, float] = {}
        self.phase: int | None = None  # the latest that was reliable, from which hysteresis departs

    def observe(self, metrics: Mapping[str, float]) -> int | None:
        """The phase after a step with these ``interference_metrics``; None where it can't be told."""
        if metrics.get("interference/live_prompts", 0) < self.min_prompts:
            return None
        if "interference/reliability" not in metrics:  # one completion of each prompt in the step
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

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"averages": dict(self.averages), "phase": self.phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        self.averages, self.phase = dict(state["averages"]), state["phase"]


class SpeedupConstant:
    """C = 8/3 of the running mean of sigma, Theorem 3.2: below 1, normalising is predicted to converge faster.

    Of rewards in [0, 1] alone: after any other there is no C (None). sigma of a step is its ``curvature/sigma_mean``;
    the running mean weighs all steps alike.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.steps = 0
        self.outside = False

    def observe(self, metrics: Mapping[str, float], reward_B: torch.Tensor) -> float | None:
        """C after a step with these ``interference_metrics`` and rewards; None before the first scorable reward."""
        self.outside |= bool(((reward_B < 0) | (reward_B > 1)).any())
        if "curvature/sigma_mean" in metrics:
            self.total += metrics["curvature/sigma_mean"]
            self.steps += 1
        return None if self.outside or self.steps == 0 else 8 / 3 * self.total / self.steps

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"total": self.total, "steps": self.steps, "outside": self.outside}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        self.total, self.steps, self.outside = float(state["total"]), int(state["steps"]), bool(state["outside"])
