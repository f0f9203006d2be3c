"""Which layers the taps follow rightly: asked of the model on a few tokens before the first step, and of each step.

What isn't followed is named once. See ``grpo_kernels/interference/tap_check.py`` for what is compared.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import kinds_of
from trl_ext.asked_model import can_be_asked, evaluation_mode, some_ids
from trl_ext.say_once import SayOnce

from .gradients import GradientParts
from .together import Together

ROWS, TOKENS, PADDING = 2, 12, 5


def rehearse(sketch: GradientSketch, model: Any, accelerator: Accelerator, say_once: SayOnce) -> None:
    """Leaves out what a forward and backward of a few made-up tokens shows to be followed wrongly, and names it.

    In evaluation mode, so that no random number is drawn, and past ``.grad``: what is trained doesn't notice. Where the
    parameters are on several processes the first step that is logged finds out.
    """
    untapped = sketch.untapped
    if untapped:
        say_once(
            f"Interference doesn't follow {len(untapped)} of {len(sketch.trainable_parameters)} trainable tensors: "
            f"{kinds_of(untapped)}. interference/coverage is the share of the gradient that it does."
        )
    if not can_be_asked(model, accelerator):
        return
    sketch.open(0)
    try:
        ids = some_ids(model, ROWS, TOKENS)
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
        say_once(
            f"Interference couldn't try the layers out ({type(error).__name__}: {error}): the first step will.", "info"
        )
        return
    finally:
        sketch.abandon()
    name_wrong(wrong, say_once)


def leave_out_wrong(sketch: GradientSketch, gradients: GradientParts, together: Together) -> dict[str, float]:
    """Of a step that was just recorded, against its gradient before clipping; the same on every process."""
    return sketch.leave_out_wrong(
        gradients,
        reduce=lambda both: together.sum(both).to(both.device),
        processes=together.processes,
    )


def name_wrong(wrong: dict[str, float], say_once: SayOnce) -> None:
    """Says what was left out, and by how much it was off."""
    if wrong:
        finite = [error for error in wrong.values() if error != float("inf")]
        off = f", up to {max(finite):.0%} off" if finite else ""
        say_once(
            f"Interference leaves out {len(wrong)} parameters whose sum over sequences isn't their gradient{off}: "
            f"{kinds_of(list(wrong))}. They aren't in interference/coverage."
        )
