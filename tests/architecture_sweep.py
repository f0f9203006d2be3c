"""Stock TRL and our trainer on one tiny model of an architecture: do the gradients agree, and who did what.

``examine(name, lora)`` runs it, ``examine(name, no_adapter)`` trains everything;
``python tests/architecture_sweep.py`` writes docs/architectures.md.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from accelerate import Accelerator
from adapters import KINDS
from architectures import NAMES, build
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.layer_taps import parameter_kinds
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer, read_interference
from trl_ext.probe_model import why_rows_mix
from trl_ext.recorder.layer_check import probe_layers
from trl_ext.tasks.small_policy import build_tokenizer

PROMPTS, GENERATIONS, STEPS = 4, 4, 3
TOLERANCE = 1e-5
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
HEADER = """# Architectures

Every causal architecture of transformers that one set of tiny sizes builds (`tests/architectures.py`), with random
weights: three SGD steps of stock TRL and of `CurvatureGRPOTrainer` on the same stored rollouts, of which a quarter has
no gradient. *right*: with skipping on and off, and with prompts that run once where the model allows it (*prompts
shared*), each step's whole gradient is TRL's to 1e-5; the number is the largest
relative distance (where TRL's own gradient moves further when it is padded otherwise, to three times that). *neither
trains it*: TRL and we end with the error in brackets. *followed*: the share of the squared gradient that interference
logging follows, each sequence's part of each parameter compared with a backward of its own; and what it left out by
itself, since it isn't what a layer of that kind does.

Made by `python tests/architecture_sweep.py`; a part of it runs with every test run, all of it nightly.

| architecture | full | LoRA | what runs | followed, full | followed, LoRA |
|---|---|---|---|---|---|
"""

ADAPTERS = """
# Adapters

Every kind of peft, on the tiny Llama, in the same way.

| adapter | gradient | what runs | followed |
|---|---|---|---|
"""


def rollouts() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of all answers to all of them in turn: uneven lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    return [ids(2, 11) for _ in range(PROMPTS)], [ids(2, 10) for _ in range(PROMPTS * GENERATIONS)]


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def reward(prompts, completion_ids, **kwargs):
    """Prompt 0's group is dead: all its answers get the same."""
    return [0.5 if prompt == "0" else sum(ids) % 4 / 4 for prompt, ids in zip(prompts, completion_ids, strict=True)]


def lora() -> LoraConfig:
    """On every Linear but the head."""
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def move_from_the_start(model: torch.nn.Module) -> None:
    """An adapter begins where it does nothing, and half of it has no gradient there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def train(trainer_class, config_class, model, tokenizer, adapter, **options):
    """(trainer, gradients of each step) on the stored rollouts; ``adapter`` a peft configuration or None."""
    prompts, answers = rollouts()

    def stored(asked, trainer):
        taken = {str(i): iter(answers[i * GENERATIONS : (i + 1) * GENERATIONS]) for i in range(PROMPTS)}
        return {
            "prompt_ids": [prompts[int(one)] for one in asked],
            "completion_ids": [next(taken[one]) for one in asked],
            "logprobs": None,
        }

    seen = Gradients()
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            num_generations=GENERATIONS,
            per_device_train_batch_size=PROMPTS * GENERATIONS // 2,
            gradient_accumulation_steps=2,
            max_completion_length=16,
            max_steps=STEPS,
            optim="sgd",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            seed=3,
            shuffle_dataset=False,
            **options,
        )
        torch.manual_seed(0)
        trainer = trainer_class(
            model=copy.deepcopy(model),
            reward_funcs=reward,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]}),
            rollout_func=stored,
            peft_config=adapter,
            callbacks=[seen],
        )
        if adapter is not None:
            move_from_the_start(trainer.model)
        trainer.train()
        logged = read_interference(folder) if (Path(folder) / "interference").is_dir() else []
        trainer.checks, trainer.coverages = (
            [record.metrics.get(f"interference/{name}", float("nan")) for record in logged]
            for name in ("sketch_check", "coverage")
        )
    return trainer, seen.steps


def distance(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> float:
    """The largest relative error of a step's whole gradient."""
    assert len(found) == len(expected) == STEPS
    errors = []
    for mine, its in zip(found, expected, strict=True):
        assert mine.keys() == its.keys(), mine.keys() ^ its.keys()
        square = sum(one.double().square().sum() for one in its.values())
        errors.append((sum((mine[n] - its[n]).double().square().sum() for n in its) / square).sqrt().item())
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
    coverage: float = float("nan")
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
    if not trainer._components.micro_batches.skipping:
        (why,) = [text for text in trainer._components.run.log_once._logged if text.startswith("Every sequence runs")]
        return f"all, as TRL: {why.split(': ', 1)[1].rstrip('.')}"
    trimming = trainer._components.micro_batches.limits.trimming
    before, after = trimming.prompts, trimming.completions
    return "live; padding cut " + {(True, True): "on both sides", (False, True): "after answers"}.get(
        (before, after), "nowhere"
    )


def examine(name: str, adapter: Callable[[], PeftConfig | None]) -> Row:
    """Trains both, ours in three ways, and sketches; ``name`` of an architecture."""
    row, model, tokenizer = Row(name), build(name), build_tokenizer((1, 4))
    tokenizer.padding_side = "left"
    theirs = None
    try:
        _, theirs = train(GRPOTrainer, GRPOConfig, model, tokenizer, adapter())
    except Exception as error:
        row.trl_fails = type(error).__name__
    errors, coverages = [], []
    for skip, every in ((True, 1), (True, 0), (False, 0)):  # a step that logs runs without sharing prompts
        try:
            options = {"interference_every": every, "interference_dim": 0, "skip_zero_advantage": skip}
            trainer, ours = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, model, tokenizer, adapter(), **options)
        except Exception as error:
            row.ours_fails = type(error).__name__
            break
        if theirs is not None:
            errors.append(distance(ours, theirs))
        if (
            skip
            and not every
            and trainer._components.micro_batches.limits.not_shared is None
            and trainer._components.micro_batches.skipping
        ):
            row.runs += "; prompts shared"
        if every:
            row.runs = what_runs(trainer)
            coverages = [coverage for coverage in trainer.coverages if coverage == coverage]
            row.check = max(trainer.checks, key=lambda check: abs(check - 1), default=float("nan"))
    row.errors = tuple(errors)
    if errors and not max(errors) <= TOLERANCE:
        for multiple in (16, 24):
            _, padded = train(GRPOTrainer, GRPOConfig, model, tokenizer, adapter(), pad_to_multiple_of=multiple)
            row.rounding = max(row.rounding, distance(padded, theirs))
    try:
        row.coverage, found, row.left_out, row.untapped = sketch_errors(model, adapter())
        row.coverage = min([row.coverage, *coverages[-1:]])  # in training the fused head is in the model's place
        row.wrong = [name for name, error in found.items() if not error < 1e-3]
    except ValueError as error:
        known = {"nothing to tap": "nothing", "switched off": str(error)}
        row.sketch_fails = next((text for start, text in known.items() if start in str(error)), type(error).__name__)
    except Exception as error:
        row.sketch_fails = type(error).__name__
    return row


def sketch_errors(
    model: torch.nn.Module, adapter: PeftConfig | None
) -> tuple[float, dict[str, float], list[str], list[str]]:
    """(share of the squared gradient that is followed, each parameter's error, what was left out, what has no tap).

    Exact: no projection, so that each sequence's part of each parameter's gradient is compared with its own backward.
    """
    model = copy.deepcopy(model)
    if adapter is not None:
        model = get_peft_model(model, adapter)
        move_from_the_start(model)
    model.train()
    if why_rows_mix(model) is not None:
        raise ValueError("switched off: rows mix")
    prompts, answers = rollouts()
    rows = [prompt + answer for prompt, answer in zip(prompts, answers[::GENERATIONS], strict=True)][:3]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def loss(keep):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logp * mask[:, 1:] * mask[:, :-1] * torch.tensor(keep)[:, None]).sum()

    weights = [0.7, -1.3, 0.4]
    sketch = GradientSketch(model, dim=0, on_error=lambda *_: None)
    parameters = sketch.trainable_parameters
    names = {id(p): n for n, p in model.named_parameters()}
    before = set(sketch.untapped)
    probe_layers(sketch, model, Accelerator(cpu=True), lambda *said: None)
    left_out = [name for name in sketch.untapped if name not in before]
    numbers = {name: number for number, name in enumerate(sketch._parameter_names)}
    sketch.open(0)
    sketch.set_rows(torch.arange(len(rows)))
    model.zero_grad()
    loss(weights).backward()
    totals = dict(sketch._sums.seen[0].total)
    left_out += sketch.exclude_mismatches([p.grad for p in parameters])  # as a step does
    tapped = {id(p) for p in sketch.tapped_parameters}
    sketch.abandon()
    sketch.close()
    truth = []
    for i in range(len(rows)):
        model.zero_grad()
        loss([w if j == i else 0.0 for j, w in enumerate(weights)]).backward()
        truth.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
    size = sum(g.square().sum() for per in truth for g in per).sqrt()
    squares = torch.stack([sum(per[n].square().sum() for per in truth) for n in range(len(parameters))])
    errors = {}
    for number, parameter in enumerate(parameters):
        if id(parameter) not in tapped:
            continue
        expected = torch.stack([per[number].flatten() for per in truth])
        found = totals.get(number, torch.zeros_like(expected)).reshape(expected.shape)
        if expected.norm() > 1e-4 * size:  # less is no part of any inner product
            errors[names[id(parameter)]] = ((found - expected).norm() / expected.norm()).item()
    covered = sum(squares[n] for n, p in enumerate(parameters) if id(p) in tapped) / squares.sum()
    big = [name for name in sorted(before, key=numbers.get) if squares[numbers[name]] > 1e-3 * squares.sum()]
    return float(covered), errors, left_out, big


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
        PAGE.write_text("\n".join([HEADER + "\n".join(models), ADAPTERS + "\n".join(adapters), ""]))


if __name__ == "__main__":
    main()
