"""GRPO on questions with right answers: ``accelerate launch examples/math.py``.

Without arguments: the built-in policy on four built-in tasks (``recipes/demo.yaml``), a few minutes on a CPU. With
them: any causal language model on GSM8K, MATH, other tasks, or a file of questions and answers. ``--help`` lists this
project's options, ``--help_all`` TRL's too.
"""

import os
import sys

# This file's name is also the standard library's. With this folder on the path, `import math` anywhere (torch, random,
# the worker processes) would import this script, so the folder goes before anything else is imported. Only `os` and
# `sys` come earlier: the interpreter has loaded them already.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != os.path.realpath(_HERE)]

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

DEMO_RECIPE = Path(_HERE) / "recipes" / "demo.yaml"
BUILT_IN = "small"
MADE_HERE = (BUILT_IN, "smollm2")
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
    from trl_ext.options import GROUPS, CurvatureOptions
    from trl_ext.tasks import command_line

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
    from trl import ModelConfig, TrlParser

    from trl_ext import CurvatureGRPOConfig
    from trl_ext.tasks.command_line import unknown_option

    class Parser(TrlParser):
        def error(self, message):
            raise ValueError(message)  # without a thousand lines of usage before it

    model_given = any(item.split("=", 1)[0] == "--model_name_or_path" for item in arguments)
    if "--config" not in arguments and not model_given:
        arguments = ["--config", str(DEMO_RECIPE), *arguments]
    arguments = ["--help" if item == "--help_all" else item for item in arguments]
    if "--config" in arguments:
        recipe = arguments[arguments.index("--config") + 1 :][:1]
        if not recipe or not Path(recipe[0]).is_file():
            raise ValueError(f"--config {' '.join(recipe)}: no such file")
    kinds = (MathArguments, CurvatureGRPOConfig, ModelConfig)
    parser = Parser(kinds, prog="examples/math.py")
    parser.set_defaults(model_name_or_path=BUILT_IN, output_dir="runs/math")
    *parsed, left_over = parser.parse_args_and_config(args=arguments, return_remaining_strings=True)
    if left_over:
        raise ValueError(unknown_option(left_over, kinds))
    return parsed


def check_arguments(script, training, model, say) -> None:
    """Raises ``ValueError`` for what can be known to fail before a model or a dataset is loaded."""
    from trl_ext.checkpoints import check_output_dir, find_checkpoint
    from trl_ext.tasks import reasoning
    from trl_ext.tasks.command_line import load_function
    from trl_ext.tasks.questions import DATASETS, PROMPT_STYLES

    gym = script.dataset_path is None and script.dataset.startswith(reasoning.PREFIX)
    if gym:
        names = reasoning.task_names(script.dataset)
        reasoning.task_options(names, script.task_options)
        reasoning.task_weights(names, script.task_weights)
    elif script.task_options or script.task_weights:
        raise ValueError(f"--task_options and --task_weights go with --dataset {reasoning.PREFIX}TASK,TASK")
    elif script.dataset_path is None and script.dataset not in DATASETS:
        raise ValueError(
            f"--dataset {script.dataset!r}: choose from {', '.join(DATASETS)} and {reasoning.PREFIX}TASK, or give "
            "--dataset_path"
        )
    if script.levels and (script.dataset_path is not None or script.dataset != "arithmetic"):
        raise ValueError("--levels goes with --dataset arithmetic")
    if script.reward is not None:
        load_function(script.reward, "--reward")
        if script.format_reward_weight:
            raise ValueError("--format_reward_weight goes with the built-in reward, not with --reward")
    if script.eval_dataset_path is not None and script.dataset_path is None:
        raise ValueError("--eval_dataset_path goes with --dataset_path")
    if script.prompt_style not in PROMPT_STYLES:
        raise ValueError(f"--prompt_style {script.prompt_style!r}: choose from {', '.join(PROMPT_STYLES)}")
    for name, least in (("eval_size", 1), ("num_shots", 0), ("train_size", 1)):
        value = getattr(script, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    if (model.load_in_4bit or model.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes")
    if (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        raise ValueError("--load_in_4bit and --load_in_8bit need --use_peft: quantized weights can't be trained")
    check_output_dir(training.output_dir)
    training.resume_from_checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir, say)


def load_questions(script, seed: int, warn, gym=None):
    """(training questions, held-out questions), each with a gold answer that can be parsed, unless ``--reward`` or a
    task of ``gym`` scores it."""
    from trl_ext.tasks.arithmetic import DEFAULT_LEVELS
    from trl_ext.tasks.correctness import drop_bad_gold
    from trl_ext.tasks.questions import (
        arithmetic_questions,
        hold_out,
        hub_questions,
        mixture_questions,
        read_questions,
    )

    columns = {"question_column": script.question_column, "answer_column": script.answer_column}
    if gym is not None:
        train = gym.questions(script.train_size or 700, held_out=False)
        held_out = gym.questions(script.eval_size, held_out=True)
    elif script.dataset_path is not None:

        def read(path: str):
            if script.reward is not None:
                return read_questions(path, **columns, own_reward=True)
            return drop_bad_gold(read_questions(path, **columns), path, warn)

        train = read(script.dataset_path)
        if script.eval_dataset_path is not None:
            held_out = read(script.eval_dataset_path)[: script.eval_size]
        else:
            train, held_out = hold_out(train, script.eval_size, seed)
    elif script.dataset == "mixture":
        train = mixture_questions(script.train_size or 700, held_out=False, seed=seed)
        held_out = mixture_questions(script.eval_size, held_out=True, seed=seed)
    elif script.dataset == "arithmetic":
        levels = tuple(script.levels) or DEFAULT_LEVELS
        train = arithmetic_questions(script.train_size or 700, held_out=False, levels=levels, seed=seed)
        held_out = arithmetic_questions(script.eval_size, held_out=True, levels=levels, seed=seed)
    else:
        train = drop_bad_gold(hub_questions(script.dataset, held_out=False, **columns), script.dataset, warn)
        held_out = hub_questions(script.dataset, held_out=True, **columns)
        held_out = drop_bad_gold(held_out, f"{script.dataset} (held out)", warn)[: script.eval_size]
    return train, held_out


def find_model(script, name: str, seed: int, state, say) -> str:
    """The folder or hub id of a model: ``small`` and ``smollm2`` are made (and cached) here, on one process first."""
    if name not in MADE_HERE:
        return name
    from trl_ext.tasks.arithmetic import DEFAULT_LEVELS
    from trl_ext.tasks.mixed_policy import mixed_policy
    from trl_ext.tasks.small_policy import small_policy
    from trl_ext.tasks.smollm2 import smollm2

    with state.local_main_process_first():
        if name == "smollm2":
            return str(smollm2())
        if is_mixture(script):
            return str(mixed_policy(seed))
        levels = tuple(script.levels) or DEFAULT_LEVELS
        return str(small_policy(seed, levels))


def is_mixture(script) -> bool:
    return script.dataset_path is None and script.dataset == "mixture"


def known_models() -> str:
    """What ``--model_name_or_path`` may be, with the folders that lie here."""
    here = sorted({str(path.parent) for depth in ("*", "*/*") for path in Path().glob(f"{depth}/config.json")})
    folders = f"folders with a model ({', '.join(here[:5])})" if here else "a folder with a model (none lies here)"
    return f"there are {', '.join(MADE_HERE)}, {folders}, and the hub's, such as Qwen/Qwen2.5-0.5B-Instruct"


def check_model(name: str) -> None:
    """Raises ``ValueError`` for a local folder that holds no model, or a name the hub can't have or hardly has."""
    from trl_ext.tasks.command_line import did_you_mean

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"--model_name_or_path {name}: the folder holds no config.json")
    hint = did_you_mean(name, MADE_HERE, closeness=0.8)  # small-model may be somebody's on the hub
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or hint):
        raise ValueError(f"--model_name_or_path {name}: no such folder{hint or ';'} {known_models()}")


def load_tokenizer(path: str, name: str, **options):
    """Raises ``ValueError`` where neither a folder nor the hub has a model of this name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left", **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model_name_or_path {name}: {known_models()}. The hub's answer: {reason}") from None


def build_trainer(script, training, model, say):
    """Everything up to the first step: questions, prompts, rewards, the model, the trainer."""
    from accelerate import PartialState
    from transformers import AutoConfig, PrinterCallback, ProgressCallback
    from transformers.utils import logging
    from trl import get_peft_config, get_quantization_config

    from trl_ext import CurvatureGRPOTrainer
    from trl_ext.checkpoints import StopWithCheckpoint
    from trl_ext.run_checks import context_of, rows_within
    from trl_ext.tasks import reasoning
    from trl_ext.tasks.command_line import load_function
    from trl_ext.tasks.console import ConsoleCallback
    from trl_ext.tasks.correctness import Correctness, MarkedAnswer, SameText
    from trl_ext.tasks.questions import NEXT_QUESTION, build_dataset

    logging.disable_progress_bar()  # of loading weights, in the middle of the table
    built_in = model.model_name_or_path == BUILT_IN
    if model.model_name_or_path not in MADE_HERE:
        check_model(model.model_name_or_path)
    gym = None
    if script.dataset_path is None and script.dataset.startswith(reasoning.PREFIX):
        names = reasoning.task_names(script.dataset)
        weights = reasoning.task_weights(names, script.task_weights)
        gym = reasoning.Tasks(names, weights, reasoning.task_options(names, script.task_options), training.seed)
    train, held_out = load_questions(script, training.seed, say, gym)

    path = find_model(script, model.model_name_or_path, training.seed, PartialState(), say)
    loading = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    tokenizer = load_tokenizer(path, model.model_name_or_path, **loading)
    style = script.prompt_style
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "few_shot"
    if style == "chat" and not tokenizer.chat_template:
        raise ValueError(f"--prompt_style chat: the tokenizer of {model.model_name_or_path} has no chat template")
    as_text = gym is not None or is_mixture(script)
    to_reason = reasoning.INSTRUCTION if as_text else INSTRUCTION
    instruction = script.instruction if script.instruction is not None else ("" if built_in else to_reason)
    shots = script.num_shots if style == "few_shot" else 0
    if (there := min(len(train), script.train_size or len(train))) <= shots:
        raise ValueError(f"--num_shots {shots} needs more than the {there} training questions there are")
    examples, train = train[:shots], train[shots:]
    context = context_of(AutoConfig.from_pretrained(path, **loading))

    def prompts_of(questions, whose: str):
        """The prompts, without those that leave no room for an answer."""
        dataset = build_dataset(questions, style, instruction=instruction, examples=examples)
        rows = rows_within(dataset, tokenizer, context)
        if len(rows) < len(dataset):
            say(
                f"{len(dataset) - len(rows)} {whose} questions are left out: longer than the model's context, {context}"
            )
        return dataset.select(rows)

    train_dataset = prompts_of(train, "training")
    if script.train_size is not None:
        train_dataset = train_dataset.select(range(min(script.train_size - shots, len(train_dataset))))
    eval_dataset = prompts_of(held_out, "held-out")

    stop = NEXT_QUESTION if style == "few_shot" else None
    rewards: list = [SameText(stop) if is_mixture(script) else Correctness(stop)]
    if gym is not None:
        rewards = [reasoning.GymScore(gym, say, stop)]
    if script.reward is not None:
        rewards = [load_function(script.reward, "--reward")]
    if script.format_reward_weight:
        rewards.append(MarkedAnswer(stop))
        training.reward_weights = training.reward_weights or [1.0, script.format_reward_weight]
    loading |= {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = {**loading, **(training.model_init_kwargs or {})}
    # The accuracy before training is measured by the training loop: a call of evaluate() before train() would leave the
    # model unwrapped under DDP, and each process would train a model of its own.
    training.eval_on_start = training.eval_strategy != "no" and training.resume_from_checkpoint is None
    trainer = CurvatureGRPOTrainer(
        model=path,
        reward_funcs=rewards,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    for replaced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(replaced)
    trainer.add_callback(ConsoleCallback())
    trainer.add_callback(StopWithCheckpoint())
    processes = trainer.accelerator.num_processes
    count = f"{processes} process" + ("es" if processes > 1 else "")
    if started_alone(processes):
        say("accelerate was asked for several processes on CPUs and started one, without telling: to have two, add")
        say("--config_file examples/accelerate/cpu_two_processes.yaml after accelerate launch.")
    sizes = f"{len(train_dataset)} training and {len(eval_dataset)} held-out questions"
    say(f"{sizes} on {count}, prompts as {style}, for example:")
    say(f"  {train[0].question!r} -> {train[0].answer[-40:]!r}")
    return trainer


def started_alone(processes: int) -> bool:
    """Whether ``accelerate launch`` was given several processes and began one: it then names a meeting point (for MPI,
    which it leaves to the caller), but nobody to meet there."""
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ)
    return processes == 1 and launched and "WORLD_SIZE" not in os.environ


def held_out_logs(trainer) -> tuple[str, list[dict[str, float]]]:
    """What is measured on the held-out questions (sampled as in training), the accuracy, or the mean of a reward of
    one's own; and the logs that have it so far, the first before training."""
    logs = trainer.state.log_history
    name = "accuracy" if any("eval_accuracy" in log for log in logs) else "reward"
    return name, [log for log in logs if f"eval_{name}" in log]


def held_out_by_task(trainer) -> list[str]:
    """Mean rewards on the held-out questions of each of several tasks, before and after, and whom the steps heard."""
    logs, evaluated = trainer.state.log_history, held_out_logs(trainer)[1]
    first, last = evaluated[0], evaluated[-1]
    before, after = "eval_tasks/", "/reward"
    names = [key[len(before) : -len(after)] for key in last if key.startswith(before) and key.endswith(after)]
    if len(names) < 2:
        return []
    lines = ["By task (mean reward):" + " " * 5 + "before   after   share of the gradient"]
    for name in names:
        rewards = [log.get(f"eval_tasks/{name}/reward") for log in (first, last)]
        heard = [log[f"tasks/{name}/heard"] for log in logs if f"tasks/{name}/heard" in log]
        cells = [*rewards, sum(heard) / len(heard) if heard else None]
        told = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"  {name[:23]:<23} " + "".join(cell.rjust(8) for cell in told))
    return lines


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(short_help())
        return

    def say(text: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(text, flush=True)

    from contextlib import nullcontext

    from trl_ext.checkpoints import CheckpointError
    from trl_ext.tasks.small_policy import trial_step
    from trl_ext.tasks.threads import quickest_threads

    try:
        script, training, model = parse_arguments(arguments)
        check_arguments(script, training, model, say)
        trainer = build_trainer(script, training, model, say)
    except ValueError as error:
        sys.exit(f"error: {error}")

    output = training.output_dir
    try:
        # a model of a million parameters: more threads may be slower
        with quickest_threads(trial_step()) if model.model_name_or_path == BUILT_IN else nullcontext():
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    stop = next(item for item in trainer.callback_handler.callbacks if type(item).__name__ == "StopWithCheckpoint")
    if stop.stopped:
        say(
            f"\nStopped at step {trainer.state.global_step} with a checkpoint in {output}. To go on, repeat the command"
        )
        say("with --resume_from_checkpoint auto")
    else:
        evaluated = [log["step"] for log in held_out_logs(trainer)[1]][-1:]
        # the best checkpoint's model isn't the one that the last step was evaluated with
        if trainer.eval_dataset is not None and (
            evaluated != [trainer.state.global_step] or training.load_best_model_at_end
        ):
            trainer.evaluate()
        try:
            trainer.save_model(output)
            trainer.save_state()
        except Exception as error:  # safetensors, torch and Python each have one of their own for a full disk
            reason = str(error).strip().splitlines()[0]
            sys.exit(f"error: the model couldn't be saved in {output}: {reason}. Its checkpoints are there")
        name, logs = held_out_logs(trainer)
        if logs:
            before, after = logs[0][f"eval_{name}"], logs[-1][f"eval_{name}"]
            say(f"\nHeld-out {name}: {before:.3f} before, {after:.3f} after ({after - before:+.3f})")
            for line in held_out_by_task(trainer):
                say(line)
        say(f"Model and checkpoints: {output}    Logs: {output}/trainer_state.json (log_history)")
        say(f"To look at the run: python -m trl_ext report {output}")
        say("Next: --normalization mean (or loo, power, ...) to compare; --model_name_or_path smollm2 or a hub id and")
        say("--dataset gsm8k for a real model; examples/recipes/ for whole configurations.")
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
