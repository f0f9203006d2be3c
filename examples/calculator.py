"""GRPO with a tool, over several turns: ``accelerate launch examples/calculator.py``, a minute or two on a CPU.

A small policy learns to add three numbers with a calculator that adds two: to call it, to call it again with what came
back, and to answer what came back last. The tool, its loop and its mask are TRL's (``tools=``); dead groups are
skipped, prompts run once and interference is logged as in any other run. Options are TRL's and this project's,
from the command line or ``--config FILE.yaml``.
"""

import os
import sys

# the repository's root takes this folder's place on the path: see math.py
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != os.path.realpath(_HERE)]
sys.path.insert(0, os.path.dirname(_HERE))
if os.path.realpath(os.getcwd()) == os.path.realpath(_HERE):
    os.environ["PYTHONSAFEPATH"] = "1"

DEFAULTS = {  # in place of the demo's
    "output_dir": "runs/calculator",
    "max_completion_length": 48,
    "max_tool_calling_iterations": 3,
    "max_steps": 40,
    "learning_rate": 3e-4,
    "logging_steps": 5,
    "eval_steps": 20,
    "save_strategy": "no",
}
COLUMNS = ("reward", "eval_accuracy", "tools/call_frequency", "tools/failure_frequency", "grad_norm")


def parse_arguments(arguments: list[str]):
    """A ``CurvatureGRPOConfig``; ``ValueError`` for what can be known to fail before the policy is warmed up."""
    from examples.tasks.command_line import demo_training, parse
    from trl_ext import CurvatureGRPOConfig
    from trl_ext.checkpoints import check_output_dir

    (training,) = parse((CurvatureGRPOConfig,), arguments, "examples/calculator.py", **demo_training() | DEFAULTS)
    check_output_dir(training.output_dir)
    training.eval_on_start = training.eval_strategy != "no" and training.resume_from_checkpoint is None
    return training


def build_trainer(training):
    """Builds the trainer: warms the policy up, or finds it in the cache; questions, reward and tool."""
    from transformers import AutoTokenizer, PrinterCallback, ProgressCallback

    from examples.tasks.calculator import SameNumber, calculate, calculator_policy, questions
    from examples.tasks.command_line import say
    from trl_ext import CurvatureGRPOTrainer
    from trl_ext.console import ConsoleCallback

    def report(step: int, loss: float) -> None:
        say(f"warming the policy up (half a minute, then cached): step {step}, loss {loss:.3f}")

    policy = str(calculator_policy(training.seed, report))
    trainer = CurvatureGRPOTrainer(
        model=policy,
        reward_funcs=[SameNumber()],
        args=training,
        train_dataset=questions(700, held_out=False, seed=training.seed),
        eval_dataset=questions(64, held_out=True, seed=training.seed),
        # with its chat and response templates
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        tools=[calculate],
    )
    for replaced in (PrinterCallback, ProgressCallback, ConsoleCallback):
        trainer.remove_callback(replaced)
    return trainer


def main(arguments: list[str]) -> None:
    import trl_ext  # noqa: F401 - before transformers: it keeps a start quiet

    # isort: split
    from transformers import TrainerCallback
    from transformers.utils import logging

    from examples.tasks.command_line import exit_on, say
    from trl_ext.checkpoints import CheckpointError

    class Table(TrainerCallback):
        """Prints a line for each log: what the trainer measured of ``COLUMNS``."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            found = {name: (logs or {}).get(name) for name in COLUMNS}
            if any(value is not None for value in found.values()):
                cells = {name: "" if value is None else f"{value:.3f}" for name, value in found.items()}
                say(f"{state.global_step:>5}" + "".join(cell.rjust(len(name) + 2) for name, cell in cells.items()))

    logging.disable_progress_bar()
    with exit_on(ValueError):
        training = parse_arguments(arguments)
    trainer = build_trainer(training)
    trainer.add_callback(Table())
    say(" step" + "".join(f"  {name}" for name in COLUMNS))
    with exit_on(CheckpointError):
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.save_state()
    trainer.end()
    say(f"Model: {training.output_dir}    To look at the run: python -m trl_ext report {training.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
