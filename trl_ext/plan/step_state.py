"""Keeps what an optimizer step starts from, so that it can be repeated: gradients and random numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch


def keep_random_state() -> Callable[[], None]:
    """Returns a function that restores torch's random states of the CPU and of the current GPU, as they are now."""
    of_cpu = torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore() -> None:
        torch.set_rng_state(of_cpu)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu)

    return restore


def keep_gradients(model: torch.nn.Module) -> Callable[[], None]:
    """Returns a function that restores ``.grad`` of all parameters, as it is now.

    Between two optimizer steps of transformers' trainer all are None; only others take a copy.
    """
    kept = {p: p.grad.detach().clone() for p in model.parameters() if p.requires_grad and p.grad is not None}

    def restore() -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = kept[parameter].clone() if parameter in kept else None

    return restore
