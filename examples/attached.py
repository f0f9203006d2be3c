"""TRL's own trainer with the prompts' gradients recorded: ``python examples/attached.py [--trainer grpo]``.

The built-in policy (made in a minute or two at the first call) learns to add. Then ``python -m trl_ext report
runs/attached`` shows how the prompts' gradients interfere. ``AsyncGRPOTrainer`` takes the same line.
"""

import os
import sys

if __name__ == "__main__":  # the repository's root in place of this folder, whose math.py hides the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import attach
from trl_ext.tasks.small_policy import small_policy

TRAINERS = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}


def question(a: int, b: int) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}


def is_right(completions: list, answer: list[str], **columns: object) -> list[float]:
    return [float(reply[0]["content"].strip() == right) for reply, right in zip(completions, answer, strict=True)]


def train(trainer: str, model: str, steps: int, every: int, folder: str) -> list[float]:
    """Returns each step's mean reward."""
    config_class, trainer_class = TRAINERS[trainer]
    run = {"output_dir": folder, "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    batch = {"per_device_train_batch_size": 64, "num_generations": 8, "max_completion_length": 4}
    args = config_class(learning_rate=2e-4, bf16=False, **run, **batch)
    questions = Dataset.from_list([question(a, b) for a in range(1, 10) for b in range(1, 10)])
    trained = trainer_class(model, is_right, args=args, train_dataset=questions)
    attach(trained, every=every)
    trained.train()
    return [entry["reward"] for entry in trained.state.log_history if "reward" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", choices=TRAINERS, default="rloo")
    parser.add_argument("--model", help="a hub id or a folder; default: the built-in policy")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--folder", default="runs/attached")
    arguments = parser.parse_args()
    arguments.model = arguments.model or str(small_policy(42))
    train(**vars(arguments))
