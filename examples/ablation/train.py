"""Trains the built-in policy of the run's seed on built-in questions: ``python examples/ablation/train.py --seed 1``.

The script of the ablations, which ``python -m trl_ext ablate`` runs with other options. By itself it trains the demo's
recipe once, logs every step and evaluates on held-out questions before training too.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository's root, where `examples` is found

import trl_ext  # noqa: F401 - before transformers: it keeps a start quiet

# isort: split
from transformers import AutoTokenizer, PrinterCallback

from examples.tasks.command_line import demo_training, exit_on, parse
from examples.tasks.correctness import Correctness, SameText
from examples.tasks.mixed_policy import mixed_policy
from examples.tasks.questions import BUILT_IN_DATASETS, build_dataset, built_in_questions
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks import small_policy
from trl_ext.tasks.arithmetic import DEFAULT_LEVELS

DEFAULTS: dict[str, Any] = {
    **demo_training(),
    **{"eval_on_start": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True},
    **{"optim": "adamw_torch", "interference_every": 10, "output_dir": "runs/train"},
}


@dataclass
class Task:
    """What is trained, on which questions."""

    dataset: str = field(default="mixture", metadata={"help": "mixture or arithmetic"})
    levels: list[int] = field(default_factory=lambda: list(DEFAULT_LEVELS), metadata={"help": "arithmetic's, 1 to 5"})
    model_name_or_path: str = field(default="small", metadata={"help": "small, hard (rarely right sums) or a folder"})
    train_size: int = field(default=700, metadata={"help": "questions to train on"})
    eval_size: int = field(default=128, metadata={"help": "held-out questions"})
    reward_noise: float = field(default=0.0, metadata={"help": "share of the rewards in training that are flipped"})

    def __post_init__(self) -> None:
        if self.dataset not in BUILT_IN_DATASETS:
            raise ValueError(f"--dataset {self.dataset!r}: choose from {', '.join(BUILT_IN_DATASETS)}")
        if not 0 <= self.reward_noise < 0.5:
            raise ValueError(f"--reward_noise {self.reward_noise} must be in [0, 0.5)")


class Flipped:
    """A reward that is 1 - itself in a share of the answers, where the dataset's column ``noisy`` is true; ``accuracy``
    is logged as it is."""

    __name__ = "flipped"

    def __init__(self, reward: Correctness, share: float, seed: int) -> None:
        self.reward, self.share, self.random = reward, share, random.Random(seed)

    def __call__(self, completions: list, noisy: list[bool], **kwargs: Any) -> list[float]:
        rewards = self.reward(completions, **kwargs)
        return [
            1 - reward if flip and self.random.random() < self.share else reward
            for flip, reward in zip(noisy, rewards, strict=True)
        ]


def hard_policy(seed: int, level: int = 1) -> Path:
    """Returns the folder of a policy that can calculate (accuracy 0.6) and was taught not to, down to 0.1."""

    class Hard(small_policy.WarmUp):
        learned, target, careless = 0.6, 0.1, 0.9

    recipe = [seed, level, Hard.learned, Hard.target, Hard.careless]
    return small_policy.cached_policy(
        "hard-policy", recipe, lambda: small_policy.warm_up(seed, (level,), kind=Hard)[:2]
    )


def policy(task: Task, seed: int) -> str:
    """Returns the policy's folder. A built-in one is made on the first call, a minute or two."""
    if task.model_name_or_path == "hard":
        return str(hard_policy(seed))
    if task.model_name_or_path != "small":
        return task.model_name_or_path
    return str(mixed_policy(seed) if task.dataset == "mixture" else small_policy.small_policy(seed, tuple(task.levels)))


def make_trainer(task: Task, args: CurvatureGRPOConfig) -> CurvatureGRPOTrainer:
    """Builds the trainer. Questions depend on the seed alone, so runs of a seed have the same ones."""
    path = policy(task, args.seed)
    reward: Any = SameText() if task.dataset == "mixture" else Correctness()
    datasets = []
    for count, held_out in ((task.train_size, False), (task.eval_size, True)):
        options = {"held_out": held_out, "levels": tuple(task.levels), "seed": args.seed}
        made = build_dataset(built_in_questions(task.dataset, count, **options), "chat")
        # rewards are flipped in training alone
        datasets.append(made.add_column("noisy", [not held_out] * count) if task.reward_noise else made)
    trainer = CurvatureGRPOTrainer(
        model=path,
        reward_funcs=[Flipped(reward, task.reward_noise, args.seed) if task.reward_noise else reward],
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
    )
    trainer.remove_callback(PrinterCallback)  # the log has it
    return trainer


if __name__ == "__main__":
    with exit_on(ValueError):
        task, args = parse((Task, CurvatureGRPOConfig), sys.argv[1:], "train.py", **DEFAULTS)
        trainer = make_trainer(task, args)
    trainer.train()
