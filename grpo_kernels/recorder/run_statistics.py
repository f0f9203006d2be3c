"""``RunStatistics``: the metrics that need several logged steps of a run."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import torch

from grpo_kernels.interference.alignment import PooledAlignment
from grpo_kernels.interference.speedup_constant import SpeedupConstant
from grpo_kernels.interference.training_phase import PhaseState, TrainingPhase

from .measure import MeasuredStep


class RunState(TypedDict):
    """``RunStatistics.state_dict()``."""

    phase: PhaseState
    speedup: dict[str, list[float]]
    alignment: NotRequired[dict[str, list[dict[str, float]]]]  # absent in checkpoints of earlier versions


class RecorderState(TypedDict):
    """``GradientRecorder.state_dict()``."""

    number: int
    started: NotRequired[float]  # absent in states of earlier versions
    statistics: RunState


class RunStatistics:
    """The alignment of the prompts' gradients, the training phase, and the theorem's constant C."""

    def __init__(self) -> None:
        self.phase, self.speedup, self.alignment = TrainingPhase(), SpeedupConstant(), PooledAlignment()

    def observe_rewards(self, rewards_PG: torch.Tensor) -> None:
        """Adds a generation batch of all ranks, before dead prompts are replaced."""
        self.speedup.observe(rewards_PG)

    def observe(self, found: MeasuredStep, *, fresh: bool) -> dict[str, float]:
        """Adds a logged step, and returns the metrics that it can compute.

        ``fresh``: whether the step's prompts are a new draw whatever their rewards; only these enter the alignment.
        """
        metrics = self.alignment.observe(*found.alignment) if fresh else {}
        values = {
            "curvature/sigma": self.speedup.sigma(),
            "curvature/speedup_constant": self.speedup.value(),
            "phase": self.phase.observe(found.metrics | metrics),
            "interference/orthogonality": found.orthogonality,
        }
        return metrics | {name: value for name, value in values.items() if value is not None}

    def state_dict(self) -> RunState:
        """Returns plain numbers, for JSON."""
        return {
            "phase": self.phase.state_dict(),
            "speedup": self.speedup.state_dict(),
            "alignment": self.alignment.state_dict(),
        }

    def load_state_dict(self, state: RunState) -> None:
        """Restores the state from what ``state_dict`` returned."""
        self.phase.load_state_dict(state["phase"])
        self.speedup.load_state_dict(state["speedup"])
        self.alignment.load_state_dict(state.get("alignment", {}))
