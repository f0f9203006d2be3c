"""Kernels, launches and waits of one optimizer step, by ``torch.profiler``: TRL, ours, ours compiled, a logged step.

"Unshared" is ours with every sequence in a row of its own, as a step that logs interference runs; its logged steps
alone are counted. On a CPU calls of ATen operations are counted, nested ones included, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from .record import Record
from .setting import Setting
from .steps import Bench, Candidate, allow_many_shapes, release, turn, variants_of

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "hipLaunch", "hipModuleLaunch", "hipExtModuleLaunch")


class ProfiledStep(TrainerCallback):
    """Profiles the last step of a ``train()``; the steps before it compile."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)
        self.seconds = float("nan")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            wait()
            self.profiler.start()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            wait()
            self.seconds = time.perf_counter() - self.start
            self.profiler.stop()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def counted(events: Iterable[Any]) -> dict[str, float]:
    """By what an event's name and device say."""
    found = dict.fromkeys(("kernels", "launches", "waits", "copies to the host", "ATen calls"), 0)
    for event in events:
        name, on_gpu = event.name, event.device_type == torch.autograd.DeviceType.CUDA
        is_copy = name.startswith(("Memcpy", "Memset"))
        found["kernels"] += on_gpu and not is_copy and not getattr(event, "is_user_annotation", False)
        found["copies to the host"] += on_gpu and name.startswith("Memcpy DtoH")
        found["launches"] += not on_gpu and name.startswith(LAUNCHES)
        found["waits"] += not on_gpu and name.startswith(("cuda", "hip")) and "Synchronize" in name
        found["ATen calls"] += name.startswith("aten::")
    return {name: float(count) for name, count in found.items() if count or name == "ATen calls"}


def candidates(sequences: int) -> dict[str, tuple[Candidate, dict[str, object]]]:
    """A trainer and further options, by the row's name."""
    ours, kept = (Candidate("ours", "ours", sequences // 4, checkpointing) for checkpointing in (True, False))
    unshared = Candidate("unshared", "before", sequences // 4, True)
    return {
        "TRL, 4 micro-batches": (Candidate("TRL", "trl", sequences // 4, True), {}),
        "TRL, 1 micro-batch": (Candidate("TRL", "trl", sequences, True), {}),
        **{one.label: (one, {}) for one in (ours, kept, *variants_of(kept))},
        "unshared": (unshared, {}),
        "unshared, logged": (unshared, {"interference_every": 1}),
    }


def measure(record: Record, setting: Setting, model: str, lora: bool) -> None:
    allow_many_shapes()
    bench = Bench(model, lora, setting)
    wanted = candidates(bench.sequences)
    name = "tiny" if setting.tiny else model
    for case in record.open_cases([f"{name} {'LoRA' if lora else 'full'}, a step's launches"]):
        for label in record.untried(case, wanted):
            with record.attempt(case, label):
                candidate, options = wanted[label]
                contender, profiled = bench.build(candidate, **options), ProfiledStep()
                contender.trainer.add_callback(profiled)
                turn(contender)
                record.add(case, label, {**counted(profiled.profiler.events()), "s while profiled": profiled.seconds})
            contender = None
            release()
