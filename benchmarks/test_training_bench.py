"""Whole training runs of built-in arithmetic to the same held-out accuracy: seconds of TRL's GRPOTrainer and of ours.

Each starts from the same warmed-up policy with the demo's options (16 prompts x 8 answers) and trains until held-out
accuracy (512 sampled answers, every 5 steps) is 0.2 above its start, or for 60 steps. Counted are the optimizer steps
with their generation, not the evaluations. The policy has a million parameters and answers with at most 4 tokens: the
calls' overhead, which skipping doesn't touch, is much of it. Ours logs interference at every tenth step, as by default,
and runs once more without. The floor is generation alone, the same in all. Only with ``--full``.
"""

import time

import pytest
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.tasks.correctness import Correctness
from examples.tasks.questions import arithmetic_questions, build_dataset
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.small_policy import small_policy

STEPS, GAIN, LEVELS = 60, 0.2, (1, 4)


class UntilAccurate(TrainerCallback):
    """Sums the seconds of optimizer steps, and ends training when the accuracy is high enough."""

    def __init__(self) -> None:
        self.seconds, self.accuracies = 0.0, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.start

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_accuracy" in logs:
            self.accuracies.append(logs["eval_accuracy"])
            control.should_training_stop |= self.accuracies[-1] >= self.accuracies[0] + GAIN


def train(trainer_class, config_class, seed: int, folder, **options) -> dict[str, float]:
    policy = small_policy(seed, LEVELS)
    watch = UntilAccurate()
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=[Correctness()],
        args=config_class(
            output_dir=str(folder),
            num_generations=8,
            per_device_train_batch_size=128,
            max_completion_length=4,
            max_steps=STEPS,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            bf16=False,
            gradient_checkpointing=False,
            eval_strategy="steps",
            eval_steps=5,
            eval_on_start=True,
            per_device_eval_batch_size=256,
            num_generations_eval=4,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **options,
        ),
        train_dataset=build_dataset(arithmetic_questions(700, held_out=False, levels=LEVELS, seed=seed), "chat"),
        eval_dataset=build_dataset(arithmetic_questions(128, held_out=True, levels=LEVELS, seed=seed), "chat"),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        callbacks=[watch],
    )
    generating = [0.0]
    generate = trainer._generate

    def timed(prompts):
        start = time.perf_counter()
        try:
            return generate(prompts)
        finally:
            generating[0] += (time.perf_counter() - start) if trainer.model.training else 0.0

    trainer._generate = timed
    trainer.train()
    return {
        "seconds": watch.seconds,
        "generation": generating[0],
        "steps": trainer.state.global_step,
        "start": watch.accuracies[0],
        "end": watch.accuracies[-1],
        "dead": [log["frac_reward_zero_std"] for log in trainer.state.log_history if "frac_reward_zero_std" in log][-1],
    }


@pytest.mark.full
@pytest.mark.parametrize("seed", [42, 0])
def test_to_the_same_accuracy(benchmark, record, seed, tmp_path):
    train(CurvatureGRPOTrainer, CurvatureGRPOConfig, seed, tmp_path / "warm-up")
    theirs = train(GRPOTrainer, GRPOConfig, seed, tmp_path / "trl")
    ours = benchmark.pedantic(
        lambda: train(CurvatureGRPOTrainer, CurvatureGRPOConfig, seed, tmp_path / "ours"), rounds=1
    )
    unlogged = train(CurvatureGRPOTrainer, CurvatureGRPOConfig, seed, tmp_path / "unlogged", interference_every=0)
    runs = {"TRL": theirs, "ours": ours, "ours without interference": unlogged}
    benchmark.extra_info.update(runs)
    for name, run in runs.items():
        record(
            "training",
            f"built-in task, seed {seed}, to +{GAIN}: {name}",
            {
                "steps": run["steps"],
                "accuracy at start": run["start"],
                "accuracy at end": run["end"],
                "dead groups": run["dead"],
            },
        )
    for name, run in list(runs.items())[1:]:
        per_step = (theirs["seconds"] / theirs["steps"]) / (run["seconds"] / run["steps"])
        without = [(one["seconds"] - one["generation"]) / one["steps"] for one in (theirs, run)]
        record(
            "training",
            f"built-in task, seed {seed}, to +{GAIN}: {name}",
            {
                "TRL / ours": theirs["seconds"] / run["seconds"],
                "TRL / ours, each step": per_step,
                "TRL / ours, each step without generation": without[0] / without[1],
                "ours / floor": run["seconds"] / run["generation"],
            },
        )
