"""GRPO on questions with right answers: ``accelerate launch examples/math.py``.

Without arguments: the built-in policy on four built-in tasks (``recipes/demo.yaml``), a few minutes on a CPU. With
them: any causal language model on GSM8K, MATH, other tasks, or a file of questions and answers. ``--help`` lists this
project's options, ``--help_all`` TRL's too.
"""

import os
import sys

# This file's name is also the standard library's. With this folder on the path, `import math` anywhere (torch, random,
# the worker processes) would import this script. So the repository's root, where `examples.tasks` is found, takes its
# place before anything else is imported; only `os` and `sys` come earlier: the interpreter has loaded them already.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != os.path.realpath(_HERE)]
sys.path.insert(0, os.path.dirname(_HERE))
if os.path.realpath(os.getcwd()) == os.path.realpath(_HERE):
    os.environ["PYTHONSAFEPATH"] = "1"  # a spawned worker would put the current folder, this one, on its path

from dataclasses import dataclass, field, fields
from importlib.util import find_spec

from examples.tasks.load_model import BUILT_IN, MADE_HERE

INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."


@dataclass
class MathArguments:
    """What to train on, and how questions become prompts."""

    dataset: str = field(default="mixture", metadata={"help": "arithmetic, gsm8k, math, reasoning_gym:T"})
    task_options: list[str] = field(default_factory=list, metadata={"help": "TASK.OPTION=VALUE, of reasoning_gym's."})
    task_weights: list[float] = field(default_factory=list, metadata={"help": "One a task; default: as much of each."})
    dataset_path: str | None = field(default=None, metadata={"help": "A .jsonl, .json or .parquet file instead."})
    eval_dataset_path: str | None = field(default=None, metadata={"help": "Held-out questions; default: a part of it."})
    question_column: str | None = field(default=None, metadata={"help": "Default: question or problem."})
    answer_column: str | None = field(default=None, metadata={"help": "Default: answer or solution."})
    levels: list[int] = field(
        default_factory=list, metadata={"help": "Arithmetic: 1-3 sums to 20, 50, 99; 4, 5 words."}
    )
    train_size: int | None = field(default=None, metadata={"help": "Training questions; default: all, or 700."})
    eval_size: int = field(default=128, metadata={"help": "Held-out questions of an evaluation."})
    prompt_style: str = field(default="auto", metadata={"help": "chat, few_shot or auto (by the tokenizer)."})
    num_shots: int = field(default=3, metadata={"help": "Examples before a few-shot question."})
    # default: INSTRUCTION, and none for the built-in policy
    instruction: str | None = field(default=None, metadata={"help": "Below a chat question; default: to reason."})
    reward: str | None = field(default=None, metadata={"help": "MODULE:FUNCTION in place of being right."})
    format_reward_weight: float = field(default=0.0, metadata={"help": "Reward for marking the answer, \\boxed{}."})


def short_help() -> str:
    """This project's options; TRL is not even imported."""
    from examples.tasks import command_line
    from trl_ext.options import GROUPS, CurvatureOptions

    model = [
        command_line.Shown("model_name_or_path", BUILT_IN, "Hub id, folder, small (built in) or smollm2."),
        command_line.Shown("use_peft", "False", "LoRA; --lora_r and the like are TRL's."),
        command_line.Shown("load_in_4bit", "False", "Quantized weights; needs --use_peft."),
        command_line.Shown("config", "", "Options from a YAML file, as in recipes/."),
    ]
    groups = {
        "Model": model,
        "Questions": command_line.shown(MathArguments, [one.name for one in fields(MathArguments)]),
        **{heading: command_line.shown(CurvatureOptions, names) for heading, names in GROUPS.items()},
    }
    return command_line.short_help(
        "accelerate launch examples/math.py [options]",
        "GRPO on mathematics and other tasks. Without options: a built-in demo.",
        groups,
        "TRL's, such as --learning_rate --max_steps --num_generations --output_dir --seed\n"
        "--max_completion_length --resume_from_checkpoint: --help_all lists them.",
    )


def parse_arguments(arguments: list[str]):
    """(MathArguments, CurvatureGRPOConfig, ModelConfig) from the command line and ``--config FILE.yaml``."""
    from trl import ModelConfig

    from examples.tasks.command_line import DEMO_RECIPE, parse
    from trl_ext import CurvatureGRPOConfig

    model_given = any(item.split("=", 1)[0] == "--model_name_or_path" for item in arguments)
    if "--config" not in arguments and not model_given:
        arguments = ["--config", str(DEMO_RECIPE), *arguments]
    arguments = ["--help" if item == "--help_all" else item for item in arguments]
    kinds = (MathArguments, CurvatureGRPOConfig, ModelConfig)
    return parse(kinds, arguments, "examples/math.py", model_name_or_path=BUILT_IN, output_dir="runs/math")


def check_arguments(script, training, model) -> None:
    """Raises ``ValueError`` for what can be known to fail before a model or a dataset is loaded."""
    from examples.tasks.command_line import say
    from examples.tasks.load_questions import load_gym
    from examples.tasks.questions import DATASETS, PROMPT_STYLES
    from examples.tasks.reasoning import PREFIX
    from trl_ext.checkpoints import check_output_dir, find_checkpoint
    from trl_ext.load_function import load_function

    gym, own_file = load_gym(script, training.seed), script.dataset_path is not None
    choices = f"{', '.join(DATASETS)} and {PREFIX}TASK"
    quantized = model.load_in_4bit or model.load_in_8bit
    no_quantizer = quantized and find_spec("bitsandbytes") is None
    as_mathematics = gym is None and script.reward is None and not is_judged_as_text(script, model)
    rules = {
        f"--task_options and --task_weights go with --dataset {PREFIX}TASK,TASK": (
            gym is None and (script.task_options or script.task_weights)
        ),
        f"--dataset {script.dataset!r}: choose from {choices}, or give --dataset_path": (
            gym is None and not own_file and script.dataset not in DATASETS
        ),
        "--levels goes with --dataset arithmetic": script.levels and (own_file or script.dataset != "arithmetic"),
        "--format_reward_weight goes with the built-in reward, not with --reward": (
            script.reward is not None and script.format_reward_weight
        ),
        "--eval_dataset_path goes with --dataset_path": script.eval_dataset_path is not None and not own_file,
        f"--prompt_style {script.prompt_style!r}: choose from {', '.join(PROMPT_STYLES)}": (
            script.prompt_style not in PROMPT_STYLES
        ),
        "--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes": no_quantizer,
        'answers are checked as mathematics: pip install "curvature-grpo[math-verify]", or give --reward': (
            as_mathematics and find_spec("math_verify") is None
        ),
        "--load_in_4bit and --load_in_8bit need --use_peft: quantized weights can't be trained": (
            quantized and not model.use_peft
        ),
    }
    for message, broken in rules.items():
        if broken:
            raise ValueError(message)
    for name, least in (("eval_size", 1), ("num_shots", 0), ("train_size", 1)):
        value = getattr(script, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    if script.reward is not None:
        load_function(script.reward, "--reward")
    check_output_dir(training.output_dir)
    training.resume_from_checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir, say)


def choose_instruction(script, built_in: bool, judged_as_text: bool) -> str:
    """The line below a chat question. ``built_in``: the small policy, which has learned to answer without one."""
    from examples.tasks import reasoning

    if script.instruction is not None:
        return script.instruction
    if built_in:
        return ""
    return reasoning.INSTRUCTION if judged_as_text else INSTRUCTION


def is_judged_as_text(script, model) -> bool:
    """Whether an answer must be the gold one's text: the mixture's, and the numbers of the built-in policy."""
    from examples.tasks.load_questions import is_mixture

    built_in = model.model_name_or_path == BUILT_IN and script.dataset_path is None
    return is_mixture(script) or (built_in and script.dataset == "arithmetic")


def choose_rewards(script, gym, as_text: bool, stop: str | None) -> list:
    """Reward functions; ``stop``: where a few-shot completion has gone on to a question of its own."""
    from examples.tasks.command_line import say
    from examples.tasks.correctness import Correctness, MarkedAnswer, SameText
    from examples.tasks.reasoning import GymScore
    from trl_ext.load_function import load_function

    if script.reward is not None:
        rewards: list = [load_function(script.reward, "--reward")]
    elif gym is not None:
        rewards = [GymScore(gym, say, stop)]
    else:
        rewards = [SameText(stop) if as_text else Correctness(stop)]
    return [*rewards, MarkedAnswer(stop)] if script.format_reward_weight else rewards


def build_trainer(script, training, model):
    """Builds the trainer: loads questions, model and tokenizer, makes prompts, chooses rewards."""
    from transformers import AutoConfig
    from transformers.utils import logging
    from trl import get_peft_config, get_quantization_config

    from examples.tasks.load_model import check_model, find_model, load_tokenizer
    from examples.tasks.load_questions import is_mixture, levels_of, load_gym, load_questions, make_prompts
    from examples.tasks.questions import NEXT_QUESTION
    from trl_ext import CurvatureGRPOTrainer
    from trl_ext.run_checks import context_of

    logging.disable_progress_bar()  # of loading weights, in the middle of the table
    name, gym = model.model_name_or_path, load_gym(script, training.seed)
    if name not in MADE_HERE:
        check_model(name)
    questions = load_questions(script, training.seed, gym)
    path = find_model(name, training.seed, levels_of(script), is_mixture(script))
    loading = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    tokenizer = load_tokenizer(path, name, **loading)
    context = context_of(AutoConfig.from_pretrained(path, **loading))
    instruction = choose_instruction(script, name == BUILT_IN, gym is not None or is_mixture(script))
    prompts = make_prompts(script, questions, instruction, tokenizer, name, context)
    stop = NEXT_QUESTION if prompts.style == "few_shot" else None
    loading |= {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = {**loading, **(training.model_init_kwargs or {})}
    if script.format_reward_weight:
        training.reward_weights = training.reward_weights or [1.0, script.format_reward_weight]
    # The accuracy before training is measured by the training loop: a call of evaluate() before train() would leave the
    # model unwrapped under DDP, and each process would train a model of its own.
    training.eval_on_start = training.eval_strategy != "no" and training.resume_from_checkpoint is None
    trainer = CurvatureGRPOTrainer(
        model=path,
        reward_funcs=choose_rewards(script, gym, is_judged_as_text(script, model), stop),
        args=training,
        train_dataset=prompts.train,
        eval_dataset=prompts.held_out if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    say_start(trainer, prompts)
    return trainer


def say_start(trainer, prompts) -> None:
    """Says how many questions and processes there are, shows a question, and chooses what is printed from here on."""
    from examples.tasks.command_line import say
    from trl_ext.checkpoints import StopWithCheckpoint
    from trl_ext.console import use_console

    processes = trainer.accelerator.num_processes
    use_console(trainer, anywhere=True)
    trainer.add_callback(StopWithCheckpoint())
    if started_alone(processes):
        say("accelerate was asked for several processes on CPUs and started one, without telling: to have two, add")
        say("--config_file examples/accelerate/cpu_two_processes.yaml after accelerate launch.")
    sizes = f"{len(prompts.train)} training and {len(prompts.held_out)} held-out questions"
    say(f"{sizes} on {processes} process{'es' if processes > 1 else ''}, prompts as {prompts.style}, for example:")
    say(f"  {prompts.first.question!r} -> {prompts.first.answer[-40:]!r}")


def started_alone(processes: int) -> bool:
    """Whether ``accelerate launch`` was given several processes and started one.

    On CPUs it leaves starting the others to MPI: it sets the master's address, and no number of processes.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ)
    return processes == 1 and launched and "WORLD_SIZE" not in os.environ


def finish(trainer) -> None:
    """Evaluates the final model, saves it, and says what came of the run."""
    from examples.tasks.command_line import say
    from examples.tasks.held_out import held_out_lines, held_out_logs

    output = trainer.args.output_dir
    evaluated = [log["step"] for log in held_out_logs(trainer.state.log_history)[1]][-1:]
    # the best checkpoint's model isn't the one that the last step was evaluated with
    if trainer.eval_dataset is not None and (
        evaluated != [trainer.state.global_step] or trainer.args.load_best_model_at_end
    ):
        trainer.evaluate()
    try:
        trainer.save_model(output)
        trainer.save_state()
    except Exception as error:  # safetensors, torch and Python each have one of their own for a full disk
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"error: the model couldn't be saved in {output}: {reason}. Its checkpoints are there")
    for line in held_out_lines(trainer.state.log_history):
        say(line)
    say(f"Model and checkpoints: {output}    Logs: {output}/trainer_state.json (log_history)")
    say(f"To look at the run: python -m trl_ext report {output}")
    say("Next: --normalization mean (or loo, power, ...) to compare; --model_name_or_path smollm2 or a hub id and")
    say("--dataset gsm8k for a real model; examples/recipes/ for whole configurations.")


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(short_help())
        return
    from contextlib import nullcontext

    from examples.tasks.command_line import exit_on, say

    say("Loading torch, transformers and TRL.")
    from trl_ext.checkpoints import CheckpointError
    from trl_ext.tasks.small_policy import trial_step
    from trl_ext.tasks.threads import quickest_threads

    with exit_on(ValueError):
        script, training, model = parse_arguments(arguments)
        check_arguments(script, training, model)
        trainer = build_trainer(script, training, model)
    # a model of a million parameters: more threads may be slower
    threads = quickest_threads(trial_step()) if model.model_name_or_path == BUILT_IN else nullcontext()
    with exit_on(CheckpointError), threads:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    stop = next(item for item in trainer.callback_handler.callbacks if type(item).__name__ == "StopWithCheckpoint")
    if stop.stopped:
        where = f"step {trainer.state.global_step} with a checkpoint in {training.output_dir}"
        say(f"\nStopped at {where}. To go on, repeat the command")
        say("with --resume_from_checkpoint auto")
    else:
        finish(trainer)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
