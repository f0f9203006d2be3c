"""A whole optimizer step at an equal memory limit: ours against the best of TRL, TRL with Liger's layers, TRL compiled.

``choose`` tries TRL at each size of a micro-batch that fits, with and without gradient checkpointing, then its variants
and ours; ``measure`` lets the fastest of each variant take turns. Generation costs nothing: the rollouts are stored.

All contenders share one model's parameters (the learning rate is 0), so that several fit; its modules are each one's
own. AdamW's state is dropped after each turn, and the first step of a turn, which makes it, isn't counted. The memory
limit is one for all: the rest of the GPU is occupied. What TRL 1.16 does with ``use_liger_kernel`` is layers alone;
older versions compute Liger's loss.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import step_contenders as steps
import torch
from compare import StepSeconds
from transformers.models.qwen2 import modeling_qwen2

from .record import FLOOR, PartFile, Record
from .setting import Setting

PROMPT_TOKENS = 100
SHARES = (0.0, 0.5)  # of dead groups
SIZES = 4  # of micro-batches: all sequences, a half, a quarter, an eighth
MEASURED = 2  # steps of a turn, after the first
ROUNDS = 5
NORMS_DIFFER = 0.05  # bf16
TURN_SECONDS, COMPILE_SECONDS = 45.0, 120.0  # what is left at least before a contender is tried; a compiled one


@dataclass(frozen=True)
class Candidate:
    """A trainer and its options. ``size``: sequences of a micro-batch (ours chooses its own from free memory)."""

    variant: str
    trainer: str  # in ``step_contenders.CLASSES``
    size: int
    checkpointing: bool
    option: str = ""  # a flag that is set

    @property
    def label(self) -> str:
        size = "" if self.is_ours else f", {self.size} a micro-batch"
        return f"{self.variant}{size}, {'' if self.checkpointing else 'no '}checkpointing"

    @property
    def is_ours(self) -> bool:
        return self.trainer != "trl"


def variants_of(best: Candidate) -> list[Candidate]:
    """The same at other options of its trainer."""
    liger = [] if best.is_ours else [replace(best, variant="TRL, Liger's layers", option="use_liger_kernel")]
    return [*liger, replace(best, variant=f"{best.variant}, compiled", option="torch_compile")]


class Bench:
    """The shared model, its rollouts, and the contenders built on it.

    ``held`` is what occupies the rest of the GPU.
    """

    def __init__(self, model: str, lora: bool, setting: Setting) -> None:
        self.lora, self.setting = lora, setting
        self.held = occupy_all_but(setting.memory_gib) if setting.device == "cuda" else None
        name = "tiny" if setting.tiny else model
        self.model, self.tokenizer = steps.random_model(name)
        vocabulary = (10, steps.SHAPES[name]["vocab_size"]) if setting.tiny else (1000, 40000)
        self.rollouts = steps.make_rollouts(0 if setting.tiny else PROMPT_TOKENS, vocabulary)
        self.sequences = len(self.rollouts.completions)

    def build(self, candidate: Candidate, **options: Any) -> steps.Contender:
        if candidate.option:
            options[candidate.option] = True
        if self.setting.tiny and candidate.option == "torch_compile":
            options["torch_compile_backend"] = "eager"  # Inductor compiles for minutes on a CPU
        contender = steps.Contender(
            candidate.trainer,
            self.lora,
            model=(self.copied_model(), self.tokenizer),
            rollouts=self.rollouts,
            per_device_train_batch_size=candidate.size,
            gradient_accumulation_steps=self.sequences // candidate.size,
            gradient_checkpointing=candidate.checkpointing,
            max_steps=1 + MEASURED,
            **options,
        )
        contender.step_seconds = StepSeconds()
        contender.trainer.add_callback(contender.step_seconds)
        return contender

    def copied_model(self) -> torch.nn.Module:
        """New modules on the same parameters."""
        kept = chain(self.model.parameters(), self.model.buffers())
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in kept})

    @property
    def plain(self) -> list[Candidate]:
        """TRL at every size, and ours, which finds its own, with and without checkpointing."""
        sizes = [self.sequences >> halvings for halvings in range(2 if self.setting.tiny else SIZES)]
        trl = [Candidate("TRL", "trl", size, kept) for size in sizes for kept in (True, False)]
        return trl + [Candidate("ours", "ours", self.sequences // 4, kept) for kept in (True, False)]


def occupy_all_but(gib: float) -> torch.Tensor:
    """A tensor that leaves ``gib`` of the GPU's memory free."""
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # libraries
    free = torch.cuda.mem_get_info()[0]
    return torch.empty(max(0, free - int(gib * 2**30)), dtype=torch.uint8, device="cuda")


@contextmanager
def model_code_restored() -> Iterator[None]:
    """Liger replaces functions of the model's module, which the other contenders call too."""
    before = dict(vars(modeling_qwen2))
    try:
        yield
    finally:
        vars(modeling_qwen2).update(before)


def turn(contender: steps.Contender) -> list[float]:
    """Seconds of each measured step; then AdamW's state is dropped."""
    trainer, times = contender.trainer, contender.step_seconds.seconds
    times.clear()
    try:
        with model_code_restored():
            trainer.train()
    finally:
        release(trainer)
    return times[1:]


def release(trainer: Any = None) -> None:
    """Frees a trainer's optimizer, and what torch's allocator keeps."""
    if trainer is not None:
        trainer.accelerator.free_memory()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
        trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_mib(bench: Bench, call: Any) -> tuple[list[float], float]:
    """What the call returns, and the most bytes in use during it, the model included, without what is occupied."""
    if bench.held is None:
        return call(), float("nan")
    torch.cuda.reset_peak_memory_stats()
    returned = call()
    return returned, (torch.cuda.max_memory_allocated() - bench.held.nbytes) / 2**20


def try_candidate(record: Record, case: str, bench: Bench, candidate: Candidate) -> float | None:
    """Seconds of a step in one turn; None if it doesn't run, whose row says why. Found once: a row is kept."""
    found = [row for row in record.file.rows if row.contender == candidate.label]
    if found or not record.untried(case, [candidate.label]):
        return found[0].values.get("s") if found else None
    if record.left() < (COMPILE_SECONDS if candidate.option else TURN_SECONDS):
        record.add(case, candidate.label, note="not tried: the part's time was nearly up")
        return None
    seconds = None
    with record.attempt(case, candidate.label):
        contender = bench.build(candidate)
        times, peak = peak_mib(bench, lambda: turn(contender))
        seconds = min(times)
        values = {"s": seconds, "gradient norm": contender.gradient_norm}
        record.add(case, candidate.label, values if peak != peak else {**values, "peak MiB": peak})
    record.file.done.append(candidate.label)
    contender = None
    release()
    return seconds


def choose(record: Record, setting: Setting, model: str, lora: bool) -> None:
    """Tries every candidate for one turn."""
    allow_many_shapes()
    bench = Bench(model, lora, setting)
    for case in record.open_cases([title(model, lora, setting, 0.0)]):
        found = {candidate: try_candidate(record, case, bench, candidate) for candidate in bench.plain}
        for ours in (False, True):
            there = {one: seconds for one, seconds in found.items() if seconds is not None and one.is_ours == ours}
            if there:
                for candidate in variants_of(min(there, key=there.__getitem__)):
                    try_candidate(record, case, bench, candidate)


def title(model: str, lora: bool, setting: Setting, share: float) -> str:
    name = "tiny" if setting.tiny else model
    return f"{name} {'LoRA' if lora else 'full'}, prompts of {PROMPT_TOKENS}, dead {share:g}"


def allow_many_shapes() -> None:
    """Several contenders compile the same code."""
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 64)
            return


def finalists(bench: Bench, chosen: PartFile | None) -> list[Candidate]:
    """The fastest of each variant, by what ``choose`` has found; without it, TRL and ours in 4 micro-batches."""
    all_of = {one.label: one for first in bench.plain for one in (first, *variants_of(first))}
    rows = chosen.all_rows if chosen else []
    seconds = {all_of[row.contender]: row.values["s"] for row in rows if row.values and row.contender in all_of}
    if not seconds:
        return [Candidate(name, name.lower(), bench.sequences // 4, True) for name in ("TRL", "ours")]
    best: dict[str, Candidate] = {}
    for candidate in sorted(seconds, key=seconds.__getitem__):
        best.setdefault(candidate.variant, candidate)
    return list(best.values())


def measure(record: Record, setting: Setting, model: str, lora: bool, chosen: PartFile | None) -> None:
    """The finalists take turns, for each share of dead groups."""
    allow_many_shapes()
    bench, contenders = Bench(model, lora, setting), {}
    cases = {title(model, lora, setting, share): share for share in SHARES}
    for place, case in enumerate(record.open_cases(cases)):
        for candidate in finalists(bench, chosen):
            for label in record.untried(case, [candidate.label]):
                with record.attempt(case, label):
                    if candidate not in contenders:
                        contenders[candidate] = bench.build(candidate)
                    contenders[candidate].dead_share = cases[case]
                    turn(contenders[candidate])  # compiles
        take_turns(record, case, bench, contenders, record.left() / (len(cases) - place) * 0.9)


def take_turns(
    record: Record, case: str, bench: Bench, contenders: dict[Candidate, steps.Contender], seconds: float
) -> None:
    """Rounds until ``seconds`` are over, at least two; a contender that fails leaves."""
    failed = {row.contender for row in record.file.rows if row.case == case}
    running = {one: contender for one, contender in contenders.items() if one.label not in failed}
    times: dict[Candidate, list[float]] = {one: [] for one in running}
    peaks: dict[Candidate, float] = {}
    until = record.left() - seconds
    for number in range(2 if bench.setting.tiny else ROUNDS):
        if number >= 2 and record.left() < until:
            break
        for one in list(running):
            before = len(times[one])
            with record.attempt(case, one.label):
                found, peaks[one] = peak_mib(bench, lambda one=one: turn(running[one]))
                times[one] += found
            if len(times[one]) == before:
                del running[one], times[one]
    write_rows(record, case, running, times, peaks)


def write_rows(
    record: Record,
    case: str,
    contenders: dict[Candidate, steps.Contender],
    times: dict[Candidate, list[float]],
    peaks: dict[Candidate, float],
) -> None:
    """Medians, each one's ratio to ours, and the best peer's to the best of ours."""
    medians = {one: statistics.median(found) for one, found in times.items()}
    best = {
        ours: min((one for one in medians if one.is_ours == ours), key=medians.__getitem__, default=None)
        for ours in (False, True)
    }
    norms = {one: contenders[one].gradient_norm for one in medians}
    usual = statistics.median(norms.values()) if norms else 0.0
    for one, seconds in medians.items():
        values = {"s": seconds, "gradient norm": norms[one]}
        note = "" if abs(norms[one] - usual) <= NORMS_DIFFER * usual else "its gradient norm is not the others'"
        if peaks[one] == peaks[one]:
            values["peak MiB"] = peaks[one]
        if best[True]:
            values["/ best of ours"] = seconds / medians[best[True]]
        record.add(case, one.label, values, note)
    if best[True]:
        with record.attempt(case, FLOOR):
            record.add(case, FLOOR, {"s": contenders[best[True]].floor_seconds()})
    if best[True] and best[False]:
        speedup = medians[best[False]] / medians[best[True]]
        record.add(case, "best", {"best peer / ours": speedup}, f"{best[False].label} / {best[True].label}")
