"""Checks that the taps see each parameter's whole gradient: on a few tokens before the first step, and in each step.

A parameter whose sum over sequences isn't its gradient is left out from then on, and named once. What is compared:
``grpo_kernels/interference/tap_check.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import kinds_of
from grpo_kernels.interference.step_gradients import PromptGroups
from trl_ext.log_once import LogOnce
from trl_ext.probe_model import can_run, evaluation_mode, probe_ids

from .collectives import Collectives
from .gradients import GradientParts

ROWS, TOKENS, PADDING = 2, 12, 5


def rehearse(sketch: GradientSketch, model: Any, accelerator: Accelerator, log_once: LogOnce) -> None:
    """Leaves out the parameters that a forward and backward of a few made-up tokens shows to be followed wrongly.

    In evaluation mode, so that no random number is drawn, and past ``.grad``: what is trained doesn't notice. Where the
    parameters are on several processes the first step that is logged finds out.
    """
    untapped = sketch.untapped
    if untapped:
        log_once(
            f"Interference doesn't follow {len(untapped)} of {len(sketch.trainable_parameters)} trainable tensors: "
            f"{kinds_of(untapped)}. interference/coverage is the share of the gradient that it does."
        )
    if not can_run(model, accelerator):
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
        wrong = sketch.leave_out_wrong(gradients, rehearsal=True)
    except Exception as error:
        log_once(
            f"Interference couldn't try the layers out ({type(error).__name__}: {error}): the first step will.", "info"
        )
        return
    finally:
        sketch.abandon()
    name_wrong(wrong, log_once)


@dataclass(frozen=True)
class LayerCheck:
    """What the optimizer's gradient shows of a recorded step.

    ``wrong``: the relative errors of the parameters that are left out now, by name. ``squares``: |gradient|^2 of each
    parameter that was trainable when the taps were set. ``total``: of all that are trained now.
    """

    wrong: dict[str, float]
    squares: list[float]
    total: float

    @property
    def spoiled(self) -> bool:
        """Whether the recorded sketches hold contributions that are wrong."""
        return any(error != math.inf for error in self.wrong.values())

    def metrics(self, sketch: GradientSketch, groups: PromptGroups, loss_scale: float) -> dict[str, float]:
        """How much of the gradient the taps follow, and whether rightly; nothing where the gradient is 0."""
        if self.total == 0:
            return {}
        followed = set(map(id, sketch.tapped_parameters))
        pairs = zip(self.squares, sketch.trainable_parameters, strict=True)
        tapped = sum(square for square, parameter in pairs if id(parameter) in followed)
        found = {"interference/coverage": tapped / self.total}
        if tapped > 0:
            norm = tapped**0.5 / loss_scale
            found["interference/sketch_check"] = max(groups.gram_PP.sum().item(), 0.0) ** 0.5 / norm
        return found


def check_layers(sketch: GradientSketch, model: torch.nn.Module, collectives: Collectives) -> LayerCheck:
    """Compares a step that was just recorded with its gradient before clipping; a collective call, the same on every
    rank."""
    gradients = GradientParts(sketch.trainable_parameters, collectives)
    wrong = sketch.leave_out_wrong(
        gradients, reduce=lambda both: collectives.sum(both).to(both.device), processes=collectives.processes
    )
    squares = gradients.squared_norms()
    if sketch.is_of(model):
        return LayerCheck(wrong, squares, sum(squares))
    trained_now = [one for one in model.parameters() if one.requires_grad]
    return LayerCheck(wrong, squares, sum(GradientParts(trained_now, collectives).squared_norms()))


def name_wrong(wrong: dict[str, float], log_once: LogOnce) -> None:
    """Logs which parameters were left out, and by how much they were off."""
    if wrong:
        finite = [error for error in wrong.values() if error != float("inf")]
        off = f", up to {max(finite):.0%} off" if finite else ""
        log_once(
            f"Interference leaves out {len(wrong)} parameters whose sum over sequences isn't their gradient{off}: "
            f"{kinds_of(list(wrong))}. They aren't in interference/coverage."
        )
