"""Checks that the taps record each parameter's full gradient: in a probe before the first logged step, and in steps.

A parameter whose sum over sequences isn't its gradient is excluded from then on, and the log names it once.
``grpo_kernels/interference/tap_check.py`` does the comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import parameter_kinds
from grpo_kernels.interference.step_gradients import PromptGroups
from trl_ext.log_once import LogOnce
from trl_ext.probe_model import evaluation_mode, is_loaded, is_sharded, probe_ids

from .collectives import Collectives
from .gradients import GradientShards

ROWS, TOKENS, PADDING = 2, 12, 5


def probe_layers(sketch: GradientSketch, model: Any, accelerator: Accelerator, log_once: LogOnce) -> None:
    """Runs a forward and backward of a few tokens, and excludes the parameters whose recorded sum is wrong.

    It runs in eval mode, so that it draws no random number, and doesn't touch ``.grad``. It does nothing if the
    parameters are sharded; the first logged step then finds wrong ones.
    """
    untapped = sketch.untapped
    if untapped:
        log_once(
            f"Interference doesn't record {len(untapped)} of {len(sketch.trainable_parameters)} trainable tensors: "
            f"{parameter_kinds(untapped)}. interference/coverage is the recorded share of the gradient."
        )
    if is_sharded(accelerator) or not is_loaded(model):
        return
    sketch.open(0)
    try:
        ids = probe_ids(model, ROWS, TOKENS)
        mask = torch.ones_like(ids)
        mask[0, :PADDING] = 0
        sketch.set_rows(torch.arange(ROWS, device=ids.device))
        with evaluation_mode(model), torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            signs = 1.0 - 2.0 * (torch.arange(logits.shape[-1], device=logits.device) * 5 % 7 % 2)
            loss = (logits.float() * signs)[mask.bool().to(logits.device)].mean()
            gradients = torch.autograd.grad(loss, sketch.trainable_parameters, allow_unused=True)
        wrong = sketch.exclude_mismatches(gradients, probe=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log_once(f"Interference couldn't probe the layers ({reason}): the first logged step checks them.", "info")
        return
    finally:
        sketch.abandon()
    log_excluded(wrong, log_once)


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


def check_layers(sketch: GradientSketch, model: torch.nn.Module, collectives: Collectives) -> LayerCheck:
    """Compares the step just recorded with its gradient before clipping. A collective; equal results on all ranks."""
    gradients = GradientShards(sketch.trainable_parameters, collectives)
    wrong = sketch.exclude_mismatches(
        gradients, reduce=lambda both: collectives.sum(both).to(both.device), processes=collectives.processes
    )
    squares = gradients.squared_norms()
    if sketch.matches(model):
        return LayerCheck(wrong, squares, sum(squares))
    trained_now = [one for one in model.parameters() if one.requires_grad]
    return LayerCheck(wrong, squares, sum(GradientShards(trained_now, collectives).squared_norms()))


def log_excluded(wrong: dict[str, float], log_once: LogOnce) -> None:
    """Logs which parameters were excluded, and their largest relative error."""
    if wrong:
        finite = [error for error in wrong.values() if error != float("inf")]
        off = f", up to {max(finite):.0%} off" if finite else ""
        log_once(
            f"Interference excludes {len(wrong)} parameters whose sum over sequences isn't their gradient{off}: "
            f"{parameter_kinds(list(wrong))}. They aren't in interference/coverage."
        )
