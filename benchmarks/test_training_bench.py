"""Whole training runs of built-in arithmetic to the same held-out accuracy: seconds of TRL's GRPOTrainer and of ours.

Each starts from the same warmed-up policy with the demo's options (16 prompts x 8 answers) and trains until held-out
accuracy (512 sampled answers, every 5 steps) is 0.2 above its start, or for 60 steps. Counted are the optimizer steps
with their generation, not the evaluations. The policy has a million parameters and answers with at most 4 tokens: the
calls' overhead, which skipping doesn't touch, is much of it. Ours logs interference at every tenth step, as by default,
and runs once more without. The floor is generation alone, the same in all. Only with ``--full``.
"""

import time

import pytest
from compare import StepSeconds
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from examples.tasks.command_line import demo_training
from examples.tasks.correctness import Correctness
from examples.tasks.questions import arithmetic_questions, build_dataset
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.small_policy import small_policy

STEPS, GAIN, LEVELS = 60, 0.2, (1, 4)


class UntilAccurate(StepSeconds):
    """Times the optimizer steps, and ends training when the accuracy is high enough."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracies: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_accuracy" in logs:
            self.accuracies.append(logs["eval_accuracy"])
            control.should_training_stop |= self.accuracies[-1] >= self.accuracies[0] + GAIN


def options_of(seed: int, folder) -> dict[str, object]:
    """The demo's options for built-in arithmetic, without those of ours."""
    recipe = {k: v for k, v in demo_training().items() if k not in ("interference_dim", "metric_for_best_model")}
    changed = {
        "max_completion_length": 4,
        "max_steps": STEPS,
        "eval_steps": 5,
        "eval_on_start": True,
        "logging_steps": 1,
    }
    quiet = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return {**recipe, **changed, **quiet, "output_dir": str(folder), "seed": seed}


def time_generation(trainer) -> list[float]:
    """Returns the seconds of each generation while training, as they come."""
    seconds: list[float] = []
    generate = trainer._generate

    def timed(prompts):
        start = time.perf_counter()
        try:
            return generate(prompts)
        finally:
            seconds.extend([time.perf_counter() - start] if trainer.model.training else [])

    trainer._generate = timed
    return seconds


def train(trainer_class, config_class, seed: int, folder, **options) -> dict[str, float]:
    policy = small_policy(seed, LEVELS)
    watch = UntilAccurate()
    train_set, held_out = (
        build_dataset(arithmetic_questions(count, held_out=held, levels=LEVELS, seed=seed), "chat")
        for count, held in ((700, False), (128, True))
    )
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=[Correctness()],
        args=config_class(**options_of(seed, folder), **options),
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        callbacks=[watch],
    )
    generating = time_generation(trainer)
    trainer.train()
    return {
        "seconds": sum(watch.seconds),
        "generation": sum(generating),
        "steps": trainer.state.global_step,
        "accuracy at start": watch.accuracies[0],
        "accuracy at end": watch.accuracies[-1],
        "dead groups": next(
            log["frac_reward_zero_std"] for log in trainer.state.log_history[::-1] if "frac_reward_zero_std" in log
        ),
    }


@pytest.mark.full
@pytest.mark.parametrize("seed", [42, 0])
def test_to_the_same_accuracy(benchmark, record, seed, tmp_path):
    ours = (CurvatureGRPOTrainer, CurvatureGRPOConfig, seed)
    train(*ours, tmp_path / "warm-up")
    theirs = train(GRPOTrainer, GRPOConfig, seed, tmp_path / "trl")
    runs = {
        "TRL": theirs,
        "ours": benchmark.pedantic(train, args=(*ours, tmp_path / "ours"), rounds=1),
        "ours without interference": train(*ours, tmp_path / "unlogged", interference_every=0),
    }
    benchmark.extra_info.update(runs)
    for name, run in runs.items():
        case = f"built-in task, seed {seed}, to +{GAIN}: {name}"
        record("training", case, {k: v for k, v in run.items() if k not in ("seconds", "generation")})
        if run is theirs:
            continue
        per_step = (theirs["seconds"] / theirs["steps"]) / (run["seconds"] / run["steps"])
        without = [(one["seconds"] - one["generation"]) / one["steps"] for one in (theirs, run)]
        ratios = {
            "TRL / ours": theirs["seconds"] / run["seconds"],
            "TRL / ours, each step": per_step,
            "TRL / ours, each step without generation": without[0] / without[1],
            "ours / floor": run["seconds"] / run["generation"],
        }
        record("training", case, ratios)
