"""Checks that the taps record each parameter's full gradient in a logged step.

A parameter whose sum over sequences isn't its gradient is excluded from then on, and the log names it once.
``grpo_kernels/interference/tap_check.py`` does the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import parameter_kinds
from grpo_kernels.interference.step_gradients import PromptGroups

from .collectives import Collectives
from .gradients import FullGradient, GradientShards


@dataclass(frozen=True)
class LayerCheck:
    """The comparison of a recorded step with the optimizer's gradient.

    Attributes:
        wrong: relative errors of the newly excluded parameters, by name.
        squares: |gradient|^2 of each parameter that was trainable when the sketch was built.
        total: |gradient|^2 of all parameters that are trained now.
    """

    wrong: dict[str, float]
    squares: list[float]
    total: float

    @property
    def spoiled(self) -> bool:
        """Whether the recorded sketches contain wrong sums. (An error of inf means that nothing was recorded.)"""
        return any(error != math.inf for error in self.wrong.values())

    def why_not_logged(self, sketch: GradientSketch, number: int) -> str | None:
        """Returns why the step with this number can't be logged; None if it can.

        Raises ``RuntimeError`` if no parameter is recorded any more.
        """
        if not sketch.tapped_parameters:
            raise RuntimeError(
                "no parameter's gradient is the sum over the rows that were passed (one that was clipped, unscaled or "
                "cleared within the step isn't, nor one of a pass without its rows)"
            )
        if self.spoiled:  # the next logged step excludes the wrong parameters
            return f"Interference of optimizer step {number} isn't logged."
        if not math.isfinite(self.total):  # a GradScaler skips such a step, and lowers its scale
            return "Interference isn't logged in steps whose gradient isn't finite."
        return None

    def metrics(self, sketch: GradientSketch, groups: PromptGroups, loss_scale: float) -> dict[str, float]:
        """Returns the recorded share of the gradient, and sketched norm / true norm; empty if the gradient is 0."""
        if self.total == 0:
            return {}
        recorded = set(map(id, sketch.tapped_parameters))
        pairs = zip(self.squares, sketch.trainable_parameters, strict=True)
        tapped = sum(square for square, parameter in pairs if id(parameter) in recorded)
        found = {"interference/coverage": tapped / self.total}
        if tapped > 0:
            norm = tapped**0.5 / loss_scale
            found["interference/sketch_check"] = max(groups.gram_PP.sum().item(), 0.0) ** 0.5 / norm
        return found


def check_layers(
    sketch: GradientSketch, model: torch.nn.Module, collectives: Collectives, full_gradient: FullGradient | None = None
) -> LayerCheck:
    """Compares the step just recorded with its gradient before clipping. A collective; equal results on all ranks.

    ``full_gradient``: see ``GradientShards``.
    """
    gradients = GradientShards(sketch.trainable_parameters, collectives, full_gradient)
    wrong = sketch.exclude_mismatches(
        gradients, reduce=lambda both: collectives.sum(both).to(both.device), processes=collectives.processes
    )
    squares = gradients.squared_norms()
    if sketch.matches(model):
        return LayerCheck(wrong, squares, sum(squares))
    trained_now = [one for one in model.parameters() if one.requires_grad]
    return LayerCheck(wrong, squares, sum(GradientShards(trained_now, collectives, full_gradient).squared_norms()))


def log_excluded(wrong: dict[str, float], log_once: Callable[[str], None]) -> None:
    """Logs which parameters were excluded, and their largest relative error."""
    if wrong:
        finite = [error for error in wrong.values() if error != float("inf")]
        off = f", up to {max(finite):.0%} off" if finite else ""
        log_once(
            f"Interference excludes {len(wrong)} parameters whose sum over sequences isn't their gradient{off}: "
            f"{parameter_kinds(list(wrong))}. They aren't in interference/coverage."
        )
