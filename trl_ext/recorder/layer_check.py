"""Checks in a probe, before the first logged step, that the taps record each parameter's full gradient.

Logged steps check it again (``grpo_kernels/recorder/layer_check.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import parameter_kinds
from grpo_kernels.recorder.layer_check import log_excluded
from trl_ext.log_once import LogOnce
from trl_ext.probe_model import evaluation_mode, is_loaded, is_sharded, probe_ids

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
