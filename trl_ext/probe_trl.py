"""Tries this package against stock TRL on a tiny model: ``python -m trl_ext.probe_trl``.

``capabilities.py`` runs it. Both train on the same rollouts, on the CPU, and each capability by itself
must give TRL's parameters and metrics. The last line of the output is the answer as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import GRPOTrainer

from .capabilities import Capabilities, nothing_works, tried
from .config import CurvatureGRPOConfig
from .trainer import CurvatureGRPOTrainer

WORDS = [f"w{number}" for number in range(40)]
TOLERANCE = 1e-3  # of the parameters' movement, and of a metric's size; rounding is below 1e-5
# what each capability stands on
NEEDS = {
    "fuse": (),
    "regroup": ("fuse",),
    "share": ("fuse", "regroup"),
    "defer": ("fuse", "regroup"),
    "interference": (),
}
Settings = dict[str, Any]
# off policy, half of the prompts without a gradient; and with a reference model, where all have one
SETTINGS: tuple[Settings, ...] = (
    {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    {"loss_type": "grpo", "beta": 0.1, "gradient_accumulation_steps": 2},
)
TIMES = ("runtime", "per_second", "step_time", "profiling")
NOT_TRLS = ("entropy",)  # replaced by entropy_live where sequences don't run


@dataclass(frozen=True)
class Outcome:
    """What a trainer did: its logged metrics by step, and its parameters' movement (a vector)."""

    logs: list[dict[str, Any]]
    movement: torch.Tensor


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.steps.append(dict(logs))


def small_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def rewards(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns equal rewards for prompts that begin with an even word, and different ones for the others."""
    dead = [int(prompt.split()[0][1:]) % 2 == 0 for prompt in prompts]
    return [0.5 if equal else (sum(ids) % 7) / 6 for equal, ids in zip(dead, completion_ids, strict=True)]


def train(trainer_class: type[GRPOTrainer], folder: str, settings: Mapping[str, Any]) -> Outcome:
    """Trains a tiny model for two steps."""
    tokenizer, logs = small_tokenizer(), Logs()
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)  # TRL loads its reference model from there
    model.config._name_or_path = folder
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    args = CurvatureGRPOConfig(
        folder,
        **{
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "epsilon": 0.001,  # so that some tokens are clipped
            "max_completion_length": 5,
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "bf16": False,
            "interference_every": 1,
            "interference_dim": 0,  # exact, so that interference/sketch_check is 1
            **settings,
        },
    )
    questions = [f"w{n} w{n + 1} w{n % 5}" + " w7" * (n % 3) for n in range(16)]
    trainer = trainer_class(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": questions}),
        processing_class=tokenizer,
        callbacks=[logs],
    )
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return Outcome(logs.steps, after - before)


def difference(ours: Outcome, trls: Outcome) -> str | None:
    """Returns how the parameters differ, or None."""
    size = float(trls.movement.norm())
    if size == 0:
        return "stock TRL didn't train the probe's model"
    distance = float((ours.movement - trls.movement).norm()) / size
    return None if distance < TOLERANCE else f"the gradient differs from stock TRL's by {distance:.2g} of its size"


def wrong_sketch(ours: Outcome) -> str | None:
    """Returns how the sum of the sequences' gradients differs from the step's gradient, or None."""
    checks = [log.get("interference/sketch_check", math.nan) for log in ours.logs]
    wrong = [check for check in checks if not abs(check - 1) < TOLERANCE]
    return f"interference/sketch_check is {wrong[0]:.3g}, not 1" if wrong else None


def different_metrics(ours: Outcome, trls: Outcome) -> set[str]:
    """Returns the names of TRL's metrics that we don't log, or with another value, and of ours that TRL doesn't log."""
    found = set()
    for mine, its in zip(ours.logs, trls.logs, strict=True):
        for name, value in its.items():
            if name in NOT_TRLS or any(part in name for part in TIMES) or not isinstance(value, int | float):
                continue
            same = name in mine and math.isclose(mine[name], value, rel_tol=TOLERANCE, abs_tol=1e-5)
            if not same and not (name in mine and math.isnan(value) and math.isnan(mine[name])):
                found.add(name)
        found |= {name for name in mine if name.startswith(("clip_ratio/", "kl")) and name not in its}
    return found


def attempt(capabilities: Capabilities, stock: list[Outcome], folder: str) -> tuple[str | None, set[str]]:
    """Returns why these capabilities together don't work (None: they do), and the metrics that differ."""
    metrics: set[str] = set()
    try:
        for settings, trls in zip(SETTINGS, stock, strict=True):
            with tried(capabilities):
                ours = train(CurvatureGRPOTrainer, folder, settings)
            if why := difference(ours, trls) or (wrong_sketch(ours) if capabilities.has("interference") else None):
                return why, metrics
            metrics |= different_metrics(ours, trls)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300], metrics
    return None, metrics


def only(*names: str) -> Capabilities:
    """Returns our advantages, logged as TRL does, and these capabilities."""
    return Capabilities({name: "not tried" for name in (*NEEDS,) if name not in names})


def probe(folder: str) -> Capabilities:
    """Returns what works. ``folder``: for the tiny model."""
    try:
        stock = [train(GRPOTrainer, folder, settings) for settings in SETTINGS]
    except Exception as error:
        return nothing_works(f"stock TRL itself: {type(error).__name__}: {error}"[:300])
    why, metrics = attempt(only(), stock, folder)
    if why is not None:
        return nothing_works(why)
    off: dict[str, str] = {}
    for name, needs in NEEDS.items():
        missing = [need for need in needs if need in off]
        if missing:
            off[name] = f"it needs {missing[0]}"
            continue
        why, different = attempt(only(*needs, name), stock, folder)
        metrics |= different
        if why is not None:
            off[name] = why
    why, different = attempt(Capabilities(off), stock, folder)
    metrics |= different
    if why is not None:
        off |= dict.fromkeys(NEEDS, f"together with the others: {why}")
    elif metrics:
        off["statistics"] = f"TRL logs these otherwise: {', '.join(sorted(metrics))}"
    return Capabilities(off, tuple(sorted(metrics)))


def main() -> None:
    torch.set_num_threads(1)  # the tiny model's products aren't worth more
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    gc.freeze()  # transformers collects garbage at each end of training: 0.3 s with all imported modules
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = probe(folder)
    print(found.to_json())


if __name__ == "__main__":
    main()
