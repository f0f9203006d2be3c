"""How tests build and train a trainer: one data set, one reward, one set of options; and how two runs are compared.

The tiny model and its tokenizer are ``tiny_policy`` of ``conftest.py``; two processes are in ``two_process_worker.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext._version_check import TESTED_TRL
from trl_ext.tasks.arithmetic import generate_problems
from trl_ext.tasks.small_policy import build_model, build_tokenizer

OPTIONS = {
    "num_generations": 4,
    "num_generations_eval": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_completion_length": 8,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "generation_kwargs": {"sequence_bias": [[[1], 5.0]]},  # token 1 ends a completion: lengths differ
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "seed": 7,
}
# TRL's own micro-batches, token by token, with no prompt shared: what most comparisons begin with
PLAIN = {"loss_type": "grpo", "share_prompts": False, "max_steps": 3}
# an optimizer step of 16 sequences in four micro-batches
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
OUR_OPTIONS = {field.name for field in fields(CurvatureGRPOConfig)} - {field.name for field in fields(GRPOConfig)}


OLD_TRANSFORMERS = Version(version("transformers")) < Version("5.20")
CONSTRAINTS = (Path(__file__).parents[1] / "constraints.txt").read_text()
PINNED = all(f"\n{name}=={version(name)}\n" in CONSTRAINTS for name in ("transformers", "peft"))
NEWEST = pytest.mark.skipif(version("trl") != TESTED_TRL[-1], reason=f"it reads the source of TRL {TESTED_TRL[-1]}")

# ---- data and rewards


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompts(count: int, split: str = "train") -> Dataset:
    return Dataset.from_dict({"prompt": [question(one.question) for one in generate_problems(count, split=split)]})


def two_tasks(count: int = 32) -> Dataset:
    return prompts(count).add_column("task", ["up" if i % 2 else "down" for i in range(count)])


def digits(completions, **kwargs):
    """Share of digits, in eighths: exactly representable, and different within most groups."""
    texts = [completion[0]["content"] for completion in completions]
    return [round(8 * sum(c.isdigit() for c in text) / max(len(text), 1)) / 8 for text in texts]


def short(completions, completion_ids, **kwargs):
    """Not scored (None) for every fifth completion."""
    return [None if sum(ids) % 5 == 0 else (1.0 if len(ids) < 6 else 0.25) for ids in completion_ids]


def by_length(completion_ids, **kwargs):
    """In [0, 1], in quarters."""
    return [(len(ids) % 5) / 4 for ids in completion_ids]


def graded(completion_ids, **kwargs):
    """In sevenths; most groups differ."""
    return [(sum(ids) % 7) / 6 for ids in completion_ids]


def dead_share(prompt, share: float) -> bool:
    """Whether the prompt is one of this share of all."""
    return zlib.crc32(prompt[0]["content"].encode()) % 100 < 100 * share


def reward_with_dead(share: float, live=digits):
    """As ``live``, but of equal rewards for this share of the prompts; 0.25 and 1 have an exact mean."""

    def reward(prompts, **kwargs):
        values = live(prompts=prompts, **kwargs)
        return [0.25 if dead_share(p, share) else v for p, v in zip(prompts, values, strict=True)]

    return reward


def live_or_not(share: float):
    """Gives the other prompts' groups rewards that always differ, for any answers."""
    return reward_with_dead(share, lambda prompts, **kwargs: [row % 4 / 4 for row in range(len(prompts))])


def tool_rollout(prompts, trainer):
    """A rollout function: completions in which three tokens, elsewhere in each row, came from a tool."""
    generator = torch.Generator().manual_seed(7 * trainer.state.global_step)
    tokenizer = trainer.processing_class
    completions = [
        torch.randint(4, len(tokenizer), (n % 5 + 3,), generator=generator).tolist() for n in range(len(prompts))
    ]
    return {
        "prompt_ids": [tokenizer.encode("<user>What is 1 + 1?<assistant>") for _ in prompts],
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": [[0 if 0 <= t - n % 4 <= 2 else 1 for t in range(len(row))] for n, row in enumerate(completions)],
    }


# ---- trainers


class Recorder(TrainerCallback):
    """Keeps what is logged, and the gradients of each optimizer step."""

    def __init__(self):
        self.logs, self.gradients = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def config(folder: Path, config_class: type = CurvatureGRPOConfig, **options: Any) -> GRPOConfig:
    """``OPTIONS`` with these changes; options of ours alone are left out of TRL's class."""
    given = {**OPTIONS, **options}
    if not issubclass(config_class, CurvatureGRPOConfig):
        given = {name: value for name, value in given.items() if name not in OUR_OPTIONS}
    return config_class(output_dir=str(folder), **given)


def lora(**options: Any) -> LoraConfig:
    """An adapter of rank 4 on every Linear but the head, with these changes."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def save_policy(folder: Path) -> Path:
    """Saves the built-in architecture with random weights and its real tokenizer (no warm-up)."""
    tokenizer = build_tokenizer((1, 4))
    torch.manual_seed(0)
    model = build_model(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)  # logits near 0: it says anything, and can be made to stop
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(policy: Path):
    return AutoTokenizer.from_pretrained(policy, padding_side="left")


def build(
    policy: Path,
    folder: Path,
    reward_funcs=digits,
    train_dataset=None,
    *,
    trainer_class: type = CurvatureGRPOTrainer,
    config_class: type | None = None,
    model: PreTrainedModel | None = None,
    processing_class=None,
    callbacks=(),
    peft_config=None,
    eval_dataset=None,
    rollout_func=None,
    environment_factory=None,
    **options: Any,
) -> GRPOTrainer:
    """A trainer of the model in ``policy``, or of ``model`` with that tokenizer; ``trainer.recorder`` is a Recorder.

    ``options`` are the configuration's; an evaluation is of eight held-out prompts.
    """
    if config_class is None:
        config_class = CurvatureGRPOConfig if issubclass(trainer_class, CurvatureGRPOTrainer) else GRPOConfig
    if eval_dataset is None and "eval_strategy" in options:
        eval_dataset = prompts(8, "held_out")
    recorder = Recorder()
    args = config(folder, config_class, **options)
    torch.manual_seed(0)  # adapters are drawn
    trainer = trainer_class(
        model=str(policy) if model is None else model,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=prompts(64) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer_of(policy) if processing_class is None else processing_class,
        peft_config=peft_config,
        rollout_func=rollout_func,
        environment_factory=environment_factory,
        callbacks=[recorder, *callbacks],
    )
    trainer.recorder = recorder
    return trainer


def train(policy: Path, folder: Path, *arguments: Any, resume: str | None = None, **options: Any) -> GRPOTrainer:
    """As ``build``, and trained."""
    trainer = build(policy, folder, *arguments, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def one_step(policy: Path, folder: Path, *arguments: Any, **options: Any):
    """(gradient as one vector, log) of one step that moves nothing, with exact interference: the same rollouts."""
    exact = {"interference_every": 1, "interference_dim": 0, "learning_rate": 0.0, "max_grad_norm": 0.0}
    rows = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 1}
    recorder = train(policy, folder, *arguments, **{**PLAIN, **exact, **rows, **options}).recorder
    return flat(recorder.gradients[0]), recorder.logs[0]


def assert_what_if(log: dict[str, Any], method: str, its: torch.Tensor, now: torch.Tensor) -> float:
    """That the log tells ``method``'s gradient ``its`` as it is, in a step whose own is ``now``; returns the cosine."""
    cos, factor = float(its @ now / its.norm() / now.norm()), float(its @ now / now.square().sum())
    assert log[f"what_if/{method}/cos"] == pytest.approx(cos, abs=1e-5)
    assert log[f"what_if/{method}/factor"] == pytest.approx(factor, rel=1e-4, abs=1e-5)
    return cos


def train_both(policy: Path, folder: Path, *arguments: Any, ours: type = CurvatureGRPOTrainer, **options: Any):
    """(ours, TRL's) trained alike and compared by ``assert_same``."""
    theirs = train(policy, folder / "trl", *arguments, trainer_class=GRPOTrainer, **options)
    mine = train(policy, folder / "ours", *arguments, trainer_class=ours, **options)
    assert_same(mine, theirs)
    return mine, theirs


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logged(trainer, key: str = "reward") -> list[dict[str, Any]]:
    """The log's entries that have this key, by default those of training steps."""
    return [log for log in trainer.recorder.logs if key in log]


def table(trainer, column: str) -> list[Any]:
    """A column of the table of completions that TRL logs: of the last batches' sequences."""
    return list(trainer._logs[column])


def logged_texts(trainer, column: str) -> list[str]:
    """The column "prompt" or "completion" as texts, which is how TRL logs them before 1.15."""
    return [one.strip() if isinstance(one, str) else one[0]["content"] for one in table(trainer, column)]


def first_batch(trainer) -> dict[str, Any]:
    """The first micro-batch the loss is given; the trainer has trained afterwards."""
    return loss_batches(trainer)[0][0]


def loss_batches(trainer) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """(micro-batch, loss) of each call of the trainer's loss, while it trains."""
    seen, compute = [], trainer._compute_loss

    def keep(model, inputs):
        copied = {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
        loss = compute(model, inputs)
        seen.append((copied, loss.detach()))
        return loss

    trainer._compute_loss = keep
    trainer.train()
    del trainer._compute_loss
    return seen


# ---- comparisons

TIMINGS = ("runtime", "per_second", "step_time", "profiling")
OURS = (
    *("normalization/", "interference/", "what_if/", "noise/", "curvature/", "theory/", "compute/", "phase"),
    *("verdicts/", "completions/repetition"),
)


def norm_of(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(g.square().sum() for g in gradients.values()).sqrt()


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The norm of the difference of two gradients of the same parameters."""
    assert ours.keys() == theirs.keys() and theirs
    return norm_of({name: ours[name] - gradient for name, gradient in theirs.items()})


def separate_gradients(model, losses) -> Iterator[dict[str, torch.Tensor]]:
    """Of each loss, which is computed when its turn comes, the gradient of every trained parameter."""
    for loss in losses:
        model.zero_grad()
        loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        yield {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
    model.zero_grad()


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    """One vector in float64, of the parameters in the order of their names."""
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


def assert_same_gradients(ours, theirs, tolerance: float = 1e-5, *, small_kl: bool = False) -> None:
    """Step by step, up to this share of each step's norm.

    ``small_kl``: a step whose gradient is the KL penalty's alone, mere rounding, is held to the largest norm.
    """
    assert len(ours) == len(theirs) > 0
    largest = max(map(norm_of, theirs))
    for mine, its in zip(ours, theirs, strict=True):
        assert distance(mine, its) <= tolerance * (largest if small_kl else norm_of(its))


def assert_same(ours, theirs, *, small_kl: bool = False) -> None:
    """Logs, advantages, gradients and parameters of two trained trainers."""
    assert len(ours.recorder.logs) == len(theirs.recorder.logs) > 0
    for our_log, their_log in zip(ours.recorder.logs, theirs.recorder.logs, strict=True):
        assert_same_log(ours, our_log, their_log)
    advantages = [torch.tensor(table(trainer, "advantages")) for trainer in (ours, theirs)]
    torch.testing.assert_close(*advantages, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours.recorder.gradients, theirs.recorder.gradients, small_kl=small_kl)
    torch.testing.assert_close(parameters(ours.model), parameters(theirs.model), rtol=1e-5, atol=1e-5)


def assert_same_log(trainer, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """A line of our trainer's log and of TRL's: the same numbers, and only numbers of ours besides."""
    extra = {key for key in ours if not key.removeprefix("eval_").startswith(OURS)} - {*theirs, "entropy_live"}
    assert not extra and set(theirs) - {"entropy"} <= set(ours)
    clear_of_zero = (
        ours.get("normalization/zero_variance_frac", 1) == 0
        and trainer.multi_objective_aggregation == "sum_then_normalize"
    )
    # they look at an advantage's sign: TRL's residue of an all-equal group has one, and ours is 0
    ignore = () if clear_of_zero else ("cispo_clip_ratio", "vespo/phi_seq")
    # rounding is as large as the terms: luspo sums a sequence's tokens where the others average, and what
    # vespo and cispo sum are log-probs, of about ln V, where the others sum ratios of about 1
    terms = 8 if trainer.loss_type in ("luspo", "vespo", "cispo") else 1
    assert_same_numbers(ours, theirs, atol=1e-6 * terms, ignore=ignore)


def assert_same_numbers(ours, theirs, *, rel: float = 1e-5, atol: float = 1e-6, ignore: tuple[str, ...] = ()) -> None:
    """All that the second line of a log has, but times and what has one of these words in its name."""
    for key, value in theirs.items():
        if any(word in key for word in (*TIMINGS, *ignore)):
            continue
        if key == "entropy" and "entropy_live" in ours:  # of what was run, in place of all tokens'
            continue
        same = value if value is None or isinstance(value, str) else pytest.approx(value, rel=rel, abs=atol)
        assert ours[key] == same, key


def messages(caplog, *texts: str) -> list[str]:
    """What was logged with all these texts in it."""
    return [record.message for record in caplog.records if all(text in record.message for text in texts)]
