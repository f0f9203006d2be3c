"""Stock TRL and our trainer on one tiny model of an architecture: do the gradients agree, and who did what.

``examine(name, lora)`` runs it, ``examine(name, no_adapter)`` trains everything;
``python tests/architecture_sweep.py`` writes the tables of docs/architectures.md.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import harness
import torch
from accelerate import Accelerator
from adapters import KINDS
from architectures import NAMES
from architectures import build as build_model
from datasets import Dataset
from harness import build, distance, norm_of, separate_gradients
from peft import LoraConfig, PeftConfig, get_peft_model
from trl import GRPOTrainer

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import parameter_kinds
from trl_ext import CurvatureGRPOTrainer, read_interference
from trl_ext.probe_model import why_rows_mix
from trl_ext.recorder.layer_check import probe_layers
from trl_ext.tasks.small_policy import build_tokenizer

PROMPTS, GENERATIONS, STEPS = 4, 4, 3
TOLERANCE = 1e-5
WEIGHTS = [0.7, -1.3, 0.4]  # of the rows whose gradients the sketch is compared with
OPTIONS = {
    "per_device_train_batch_size": PROMPTS * GENERATIONS // 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 16,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.0,
    "generation_kwargs": None,
    "logging_strategy": "no",
    "shuffle_dataset": False,
    "seed": 3,
}
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def rollouts() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of all answers to all of them in turn: uneven lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    return [ids(2, 11) for _ in range(PROMPTS)], [ids(2, 10) for _ in range(PROMPTS * GENERATIONS)]


def reward(prompts, completion_ids, **kwargs):
    """Prompt 0's group is dead: all its answers get the same."""
    return [0.5 if prompt == "0" else sum(ids) % 4 / 4 for prompt, ids in zip(prompts, completion_ids, strict=True)]


def lora() -> LoraConfig:
    return harness.lora(task_type="CAUSAL_LM")


def move_from_the_start(model: torch.nn.Module) -> None:
    """An adapter begins where it does nothing, and half of it has no gradient there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def stored(asked, trainer):
    """A rollout function: the prompts' stored answers, in turn."""
    prompts, answers = rollouts()
    taken = {str(i): iter(answers[i * GENERATIONS : (i + 1) * GENERATIONS]) for i in range(PROMPTS)}
    return {
        "prompt_ids": [prompts[int(one)] for one in asked],
        "completion_ids": [next(taken[one]) for one in asked],
        "logprobs": None,
    }


@dataclass
class Run:
    """A trained trainer, each step's gradient, and two figures of each logged step, NaN where one is missing."""

    trainer: GRPOTrainer
    steps: list[dict[str, torch.Tensor]]
    checks: list[float]
    coverages: list[float]


def train(trainer_class: type, model: torch.nn.Module, adapter: PeftConfig | None, **options) -> Run:
    """Trains a copy of ``model`` on the stored rollouts."""
    tokenizer = build_tokenizer((1, 4))
    tokenizer.padding_side = "left"
    options |= {"model": copy.deepcopy(model), "processing_class": tokenizer, "peft_config": adapter}
    dataset = Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options |= {"trainer_class": trainer_class, "rollout_func": stored}
        trainer = build(folder, folder, reward, dataset, **{**OPTIONS, **options})
        if adapter is not None:
            move_from_the_start(trainer.model)
        trainer.train()
        records = read_interference(folder) if (folder / "interference").is_dir() else []
    checks, coverages = (
        [record.metrics.get(f"interference/{name}", math.nan) for record in records]
        for name in ("sketch_check", "coverage")
    )
    return Run(trainer, trainer.recorder.gradients, checks, coverages)


def largest_error(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> float:
    """The largest relative error of a step's whole gradient."""
    assert len(found) == len(expected) == STEPS
    errors = [float(distance(*pair) / norm_of(pair[1])) for pair in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: (error != error, error))  # NaN is the largest


@dataclass
class Row:
    """What came of an architecture: ``errors`` of the gradient with skipping on, on and prompts shared where they may
    be, and off, against TRL's.

    ``rounding``: where they aren't within ``TOLERANCE``, how far TRL's own gradient moves with padding that changes
    nothing but the order of its sums. ``trl_fails``, ``ours_fails``: the error's type, or None. ``runs``: what of a
    batch runs. ``coverage``: the share of the squared gradient that is followed; ``wrong``: parameters whose sketch
    isn't their gradient, ``left_out``: those that were found out, ``untapped``: those without a tap. ``check``: the
    trainer's own ``sketch_check``, NaN where nothing was logged.
    """

    name: str
    errors: tuple[float, ...] = ()
    rounding: float = 0.0
    trl_fails: str | None = None
    ours_fails: str | None = None
    runs: str = ""
    coverage: float = math.nan
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    untapped: list[str] = field(default_factory=list)
    check: float = 1.0
    sketch_fails: str | None = None

    @property
    def verdict(self) -> str:
        """right, WRONG, or who can't train it."""
        if self.ours_fails is not None:
            return f"neither trains it ({self.trl_fails})" if self.trl_fails else f"REFUSED ({self.ours_fails})"
        if self.trl_fails is not None:
            return f"trains; TRL doesn't ({self.trl_fails})"
        return "right" if max(self.errors) <= max(TOLERANCE, 3 * min(self.rounding, 1e-4)) else "WRONG"


def what_runs(trainer: CurvatureGRPOTrainer) -> str:
    """In a few words."""
    micro_batches = trainer._components.micro_batches
    if not micro_batches.skipping:
        (why,) = [text for text in trainer._components.run.log_once._logged if text.startswith("Every sequence runs")]
        return f"all, as TRL: {why.split(': ', 1)[1].rstrip('.')}"
    trimming = micro_batches.limits.trimming
    sides = {(True, True): "on both sides", (False, True): "after answers"}
    return f"live; padding cut {sides.get((trimming.prompts, trimming.completions), 'nowhere')}"


def examine(name: str, adapter: Callable[[], PeftConfig | None]) -> Row:
    """Trains both, ours in three ways, and sketches; ``name`` of an architecture."""
    row, model, theirs = Row(name), build_model(name), None
    try:
        theirs = train(GRPOTrainer, model, adapter()).steps
    except Exception as error:
        row.trl_fails = type(error).__name__
    try:
        compare_trainers(row, model, adapter, theirs)
    except Exception as error:
        row.ours_fails = type(error).__name__
    if row.errors and not max(row.errors) <= TOLERANCE:
        for multiple in (16, 24):
            padded = train(GRPOTrainer, model, adapter(), pad_to_multiple_of=multiple).steps
            row.rounding = max(row.rounding, largest_error(padded, theirs))
    try:
        compare_sketch(row, model, adapter())
    except Exception as error:
        known = {"nothing to tap": "nothing", "switched off": str(error)} if isinstance(error, ValueError) else {}
        row.sketch_fails = next((text for start, text in known.items() if start in str(error)), type(error).__name__)
    return row


def compare_trainers(
    row: Row, model: torch.nn.Module, adapter: Callable[[], PeftConfig | None], theirs: list | None
) -> None:
    """Trains ours with skipping and logging, with skipping, and with neither; a step that logs shares no prompts."""
    for skip, every in ((True, 1), (True, 0), (False, 0)):
        options = {"interference_every": every, "interference_dim": 0, "skip_zero_advantage": skip}
        ours = train(CurvatureGRPOTrainer, model, adapter(), **options)
        if theirs is not None:
            row.errors = (*row.errors, largest_error(ours.steps, theirs))
        micro_batches = ours.trainer._components.micro_batches
        if every:
            row.runs = what_runs(ours.trainer)
            row.check = max(ours.checks, key=lambda check: abs(check - 1), default=math.nan)
            # in training the fused head is in the model's place
            row.coverage = next((value for value in reversed(ours.coverages) if value == value), math.nan)
        elif skip and micro_batches.skipping and micro_batches.limits.not_shared is None:
            row.runs += "; prompts shared"


def weighted_loss(model: torch.nn.Module) -> Callable[[list[float]], torch.Tensor]:
    """Returns the loss of three of the stored rows as a function of the rows' weights."""
    prompts, answers = rollouts()
    rows = [prompt + answer for prompt, answer in zip(prompts, answers[::GENERATIONS], strict=True)][: len(WEIGHTS)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def loss(weights: list[float]) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logp * mask[:, 1:] * mask[:, :-1] * torch.tensor(weights)[:, None]).sum()

    return loss


def compare_sketch(row: Row, model: torch.nn.Module, adapter: PeftConfig | None) -> None:
    """Compares each sequence's part of each parameter's gradient with a backward pass of its own.

    Nothing is projected, so that the comparison is exact.
    """
    model = copy.deepcopy(model)
    if adapter is not None:
        model = get_peft_model(model, adapter)
        move_from_the_start(model)
    model.train()
    if why_rows_mix(model) is not None:
        raise ValueError("switched off: rows mix")
    loss, parameters = weighted_loss(model), {n: p for n, p in model.named_parameters() if p.requires_grad}
    sketch = GradientSketch(model, dim=0, on_error=lambda *_: None)
    names = {id(parameter): name for name, parameter in parameters.items()}
    tapped, untapped = [names[id(parameter)] for parameter in sketch.tapped_parameters], sketch.untapped
    probe_layers(sketch, model, Accelerator(cpu=True), lambda *text: None)
    row.left_out = [name for name in sketch.untapped if name not in untapped]
    with sketch.step(0) as recorded, sketch.rows(torch.arange(len(WEIGHTS))):
        loss(WEIGHTS).backward()
    row.left_out += sketch.exclude_mismatches([parameter.grad for parameter in parameters.values()])  # as a step does
    parts = recorded[0].sketch[:, 0].split([parameters[name].numel() for name in tapped], dim=1)

    alone = [[w if j == i else 0.0 for j, w in enumerate(WEIGHTS)] for i in range(len(WEIGHTS))]
    rows = list(separate_gradients(model, map(loss, alone)))
    truth = {name: torch.stack([one[name].flatten() for one in rows]) for name in parameters}
    squares = {name: gradient.square().sum() for name, gradient in truth.items()}
    whole = sum(squares.values())
    followed = {names[id(parameter)] for parameter in sketch.tapped_parameters}
    for name, found in zip(tapped, parts, strict=True):
        # less is no part of any inner product
        if name in followed and squares[name].sqrt() > 1e-4 * whole.sqrt():
            if not (found - truth[name]).norm() / truth[name].norm() < 1e-3:
                row.wrong.append(name)
    coverage = float(sum(squares[name] for name in followed) / whole)
    row.coverage = coverage if math.isnan(row.coverage) else min(coverage, row.coverage)
    row.untapped = [name for name in untapped if squares[name] > 1e-3 * whole]


def cell(row: Row) -> str:
    """A row's half of the table."""
    figures = f" {max(row.errors):.0e}" if row.errors else ""
    figures += f" (TRL's own rounding {row.rounding:.0e})" if row.rounding else ""
    return f"{row.verdict}{figures}"


def sketched(row: Row) -> str:
    """Coverage, and what isn't followed."""
    if row.sketch_fails is not None:
        return row.sketch_fails
    if row.wrong:
        return f"WRONG: {parameter_kinds(row.wrong)}"
    text = f"{row.coverage:.2f}"
    for what, names in (("left out", row.left_out), ("no tap", row.untapped)):
        if names:
            text += f"; {what}: {parameter_kinds([_short(name) for name in names])}"
    return text


def _short(name: str) -> str:
    return ".".join(part for part in name.split(".")[-3:] if part not in ("default", "model"))


def no_adapter() -> None:
    """Everything is trained."""


def main() -> None:
    logging.disable(logging.WARNING)
    asked = sys.argv[1:]
    if unknown := set(asked) - {*NAMES, *KINDS}:
        sys.exit(f"no such architecture or adapter: {', '.join(sorted(unknown))}")
    models, adapters = [], []
    for name in asked or NAMES:
        if name in NAMES:
            full, low = examine(name, no_adapter), examine(name, lora)
            runs = full.runs or low.runs
            models.append(f"| {name} | {cell(full)} | {cell(low)} | {runs} | {sketched(full)} | {sketched(low)} |")
            print(models[-1], flush=True)
    for kind in asked or KINDS:
        if kind in KINDS:
            row = examine("llama", KINDS[kind])
            adapters.append(f"| {kind} | {cell(row)} | {row.runs} | {sketched(row)} |")
            print(adapters[-1], flush=True)
    if not asked:
        write_page(models, adapters)


def write_page(*tables: list[str]) -> None:
    """Replaces the rows of the page's tables; its text stays."""
    rows = iter(tables)
    text = re.sub(r"(\|[-|]+\|\n)(\|.*\n)*", lambda head: head[1] + "\n".join([*next(rows), ""]), PAGE.read_text())
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
