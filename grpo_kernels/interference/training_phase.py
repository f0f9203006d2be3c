"""Finds the phase of training from the metrics of several steps (arXiv 2601.23135, Figure 3 and Table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict


class PhaseState(TypedDict):
    """``TrainingPhase.state_dict()``."""

    averages: dict[str, float]
    phase: int | None


def alignment_interval(metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """Returns the ends of the interval of ``alignment`` or, without scores, of ``alignment_trained``; None without."""
    for name in ("interference/alignment", "interference/alignment_trained"):
        if name in metrics:
            return metrics[f"{name}_low"], metrics[f"{name}_high"]
    return None


@dataclass
class TrainingPhase:
    """Finds the training phase (1, 2 or 3) from moving averages of ``near_orthogonal_frac`` and ``cos_std``.

    It is phase 1 while ``near_orthogonal_frac`` is at least ``near_orthogonal``; else phase 2 while ``cos_std`` is
    below its limit, and phase 3 above it. A run may skip phases and return to earlier ones. The paper's rows (0.977,
    0.045), (0.803, 0.066) and (0.524, 0.130) are phases 1, 2 and 3. (Interpolated between them, the second boundary is
    near step 390; the paper draws it at 300.) A step without ``cos_std``, whose variance is below the sketch's, counts
    as 0.

    Rollout noise shrinks raw cosines, so phases depend on the group size, and prompts of one true gradient look
    near-orthogonal where there is much noise. So there is no phase while the ``alignment`` of the prompts' gradients,
    from which that noise is removed, isn't known to within ``max_interval``, and no phase 1 where its interval lies
    above ``1 - near_orthogonal``.

    Attributes:
        near_orthogonal, cos_std: the limits.
        hysteresis: to leave a phase, a statistic must pass its limit by this share of ``cos_std``, or of
            ``1 - near_orthogonal``.
        decay: of the moving averages.
        max_interval: the phase is None while the alignment has no 95 % interval, or a wider one.
        min_prompts: a step with fewer live prompts has no phase, and doesn't enter the averages.
        averages: the moving averages by metric.
        phase: the latest known phase, from which hysteresis starts.
    """

    near_orthogonal: float = 0.9
    cos_std: float = 0.1
    hysteresis: float = 0.1
    decay: float = 0.9
    max_interval: float = 0.5
    min_prompts: int = 4
    averages: dict[str, float] = field(default_factory=dict)
    phase: int | None = None

    def observe(self, metrics: Mapping[str, float]) -> int | None:
        """Returns the phase after a step with these metrics, the alignment's among them; None if it isn't known."""
        if metrics.get("interference/live_prompts", 0) < self.min_prompts:
            return None
        for name in ("near_orthogonal_frac", "cos_std"):
            value = metrics.get(f"interference/{name}", 0.0)
            previous = self.averages.get(name, value)
            self.averages[name] = self.decay * previous + (1 - self.decay) * value
        interval = alignment_interval(metrics)
        if interval is None or interval[1] - interval[0] > self.max_interval:
            return None
        if self._next() == 1 and interval[0] > 1 - self.near_orthogonal + 1e-12:
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
