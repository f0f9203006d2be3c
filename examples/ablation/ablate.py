"""Which normalisation learns best, everything else equal: ``python examples/ablation/ablate.py``.

Trains the built-in policy on a built-in dataset (``recipes/demo.yaml``) with every method at every learning rate on
the sweep's seeds, then with every method at its best learning rate on other seeds; writes a CSV, a plot and a table.
Without arguments a small comparison, some minutes on two CPU cores. Repeat an interrupted command to go on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.ablation.curves import Run
    from examples.ablation.runs import Settings, Workers

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository's root, where `examples` is found
    # worker processes must not look for modules in the working directory: in examples/ a math.py lies
    os.environ["PYTHONSAFEPATH"] = "1"

BUILT_IN = "small"


# Arguments -> the settings of each run


def make_parser(description: str, prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, prog=prog
    )

    def add(name: str, default: object, text: str | None = None, **more) -> None:
        kind = str if default is None else type(default[0] if isinstance(default, list) else default)
        several = {"nargs": "+"} if isinstance(default, list) else {}
        parser.add_argument(f"--{name}", default=default, help=text, **{"type": kind, **several, **more})

    add("methods", ["mean", "std"], "normalizations, as std or power:alpha=0.5,eps=1e-4")
    add("learning_rates", [5e-5, 1e-4, 2e-4, 4e-4], "the sweep; a single one: no sweep")
    add("sweep_seeds", [100], "seeds that choose the learning rates")
    add("seeds", [0, 1, 2], "seeds of the comparison, other than the sweep's")
    add("max_steps", 60)
    add("eval_every", 10, "steps between measurements of the held-out accuracy")
    add("eval_size", 128, "held-out questions, four sampled answers each")
    add("target_accuracy", 0.7, "held-out accuracy to count the steps to")
    add("num_generations", 8, "answers to a prompt, of those of a step")
    add("answers_per_step", 128, "answers of a step, to all its prompts")
    add("reward_noise", 0.0, "share of the rewards in training that are flipped, 1 - reward")
    datasets = ("mixture", "arithmetic")
    add("dataset", "mixture", "four unlike tasks, or arithmetic alone", choices=datasets)
    add("levels", None, "arithmetic's levels 1 to 5, see examples/math.py; default: 1 4", nargs="+", type=int)
    add("optim", "adamw_torch", "as transformers names it; sgd: plain gradient steps, as in the theory")
    add("max_grad_norm", 1.0, "clipping, which hides a method's scale; 0: none")
    add("interference_every", 10, "steps between measurements of interference, which curvature needs; 0: none")
    add("model_name_or_path", BUILT_IN, "folder of one policy for every seed; small: a built-in one each")
    add("jobs", 2, "runs at the same time, one thread each")
    add("output_dir", "runs/ablation")
    return parser


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    return make_parser(__doc__ or "", "ablate.py").parse_args(arguments)


def parse_method(text: str) -> tuple[str, dict[str, float]]:
    """``power:alpha=0.5,eps=1e-4`` -> ``("power", {"alpha": 0.5, "eps": 1e-4})``."""
    name, _, listed = text.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        key, _, value = item.partition("=")
        try:
            options[key] = float(value)
        except ValueError:
            raise ValueError(f"--methods {text}: {item!r} isn't option=number, as in power:alpha=0.5") from None
    return name, options


def check_options(options: argparse.Namespace, *, lists: Sequence[str] = (), positive: Sequence[str]) -> None:
    """Raises ``ValueError`` for a list with repetitions, or a number below 1."""
    for name in lists:
        values = getattr(options, name)
        if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
            raise ValueError(f"--{name} has {', '.join(repeated)} more than once")
    for name in positive:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")


def check_numbers(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for a number out of its range."""
    if bad := [rate for rate in options.learning_rates if not 0 < rate < float("inf")]:
        raise ValueError(f"--learning_rates {bad[0]} must be a number above 0")
    if overlap := sorted(set(options.seeds) & set(options.sweep_seeds)):
        shared = f"--seeds and --sweep_seeds share {', '.join(map(str, overlap))}"
        raise ValueError(f"{shared}: a learning rate chosen on a seed would flatter its method there")
    answers, group = options.answers_per_step, options.num_generations
    wrong = {
        f"max_steps must be a multiple of --eval_every {options.eval_every}, so that the last step is measured": (
            options.max_steps % options.eval_every
        ),
        f"num_generations must be at least 2 and divide a step's {answers}": (
            group < 2 or answers < group or answers % group
        ),
        "reward_noise must be in [0, 0.5)": not 0 <= options.reward_noise < 0.5,
        "max_grad_norm must be a finite number that is not negative": not 0 <= options.max_grad_norm < float("inf"),
        "target_accuracy must be in (0, 1]": not 0 < options.target_accuracy <= 1,
    }
    for rule, broken in wrong.items():
        if broken:
            name, _, rest = rule.partition(" ")
            raise ValueError(f"--{name} {getattr(options, name)} {rest}")


def check_arguments(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for what can be known to fail before anything is trained."""
    from examples.tasks.questions import built_in_questions
    from trl_ext import CurvatureGRPOConfig
    from trl_ext.checkpoints import check_output_dir

    if find_spec("matplotlib") is None:
        raise ValueError("the plot needs matplotlib: pip install matplotlib")
    positive = ["max_steps", "eval_every", "eval_size", "jobs"]
    check_options(options, lists=["methods", "learning_rates", "sweep_seeds", "seeds"], positive=positive)
    check_numbers(options)
    if options.model_name_or_path != BUILT_IN and not (Path(options.model_name_or_path) / "config.json").is_file():
        raise ValueError(f"--model_name_or_path {options.model_name_or_path}: no folder with a config.json")
    if options.levels and options.dataset != "arithmetic":
        raise ValueError("--levels goes with --dataset arithmetic")
    for method in options.methods:
        settings = run_settings(options, method, options.learning_rates[0], options.seeds[0])
        CurvatureGRPOConfig(**settings.training, output_dir=options.output_dir)
    levels = tuple(settings.levels)
    built_in_questions(options.dataset, options.eval_size, held_out=True, levels=levels, seed=settings.seed)
    check_output_dir(options.output_dir)


def run_settings(options: argparse.Namespace, method: str, learning_rate: float, seed: int) -> Settings:
    """The demo's recipe with what the ablation changes. Two runs differ in method, learning rate and seed alone."""
    from examples.ablation.runs import Settings
    from examples.tasks.command_line import demo_training
    from trl_ext.tasks.arithmetic import DEFAULT_LEVELS

    arithmetic = options.dataset == "arithmetic"
    name, kwargs = parse_method(method)
    training = {
        **demo_training(),
        **({"max_completion_length": 4} if arithmetic else {}),
        "normalization": name,
        "normalization_kwargs": kwargs,
        "learning_rate": learning_rate,
        "seed": seed,
        **{k: getattr(options, k) for k in ("num_generations", "optim", "max_grad_norm", "interference_every")},
        "per_device_train_batch_size": options.answers_per_step,
        "max_steps": options.max_steps,
        "eval_steps": options.eval_every,
        "eval_on_start": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Settings(
        method,
        training,
        model=None if options.model_name_or_path == BUILT_IN else options.model_name_or_path,
        dataset=options.dataset,
        levels=list(options.levels or DEFAULT_LEVELS) if arithmetic else [],
        eval_size=options.eval_size,
        reward_noise=options.reward_noise,
    )


# Results -> files


def write_results(options: argparse.Namespace, sweep: list[Run], finals: dict[str, list[Run]]) -> None:
    from examples.ablation.plots import draw_ablation, draw_tasks
    from examples.ablation.tables import by_task, methods_table, rates_table, task_names, write_csv

    folder = Path(options.output_dir)
    tidy = [
        {"phase": phase, "method": run.method, "learning_rate": run.learning_rate, "seed": run.seed, **row}
        for phase, runs in (("sweep", sweep), *(("final", runs) for runs in finals.values()))
        for run in runs
        for row in run.rows
    ]
    write_csv(folder / "results.csv", tidy)
    table = methods_table(finals, options.learning_rates, options.target_accuracy, options.max_steps)
    text = table + rates_table(sweep) + by_task(finals)
    (folder / "table.md").write_text(text)
    clipping = f"clipped at {options.max_grad_norm:g}" if options.max_grad_norm else "not clipped"
    title = (
        f"mean and 95% band over {len(options.seeds)} seeds; {options.optim}, gradients {clipping}, "
        "each method at its best learning rate"
    )
    files = [folder / "ablation.png"]
    draw_ablation(finals, options.target_accuracy, options.eval_every, title, files[0])
    if task_names(finals):
        files.append(folder / "tasks.png")
        draw_tasks(finals, task_names(finals), files[-1])
    names = ", ".join(file.name for file in files)
    print(f"\n{text}\nWritten to {folder}: results.csv, table.md, {names}")


def compare(
    options: argparse.Namespace, last: Mapping[str, object] | None = None
) -> tuple[list[Run], dict[str, list[Run]], Workers]:
    """Trains all: the sweep, then each method at its best rate; the runs of both, the latter by method; the workers.

    ``last``: the trainer's options that only the runs at the best rates have. Ends the program where arguments are
    wrong, a worker is killed, or on Ctrl-C.
    """
    from examples.ablation.curves import best_learning_rate
    from examples.ablation.runs import Workers
    from examples.tasks.command_line import exit_on

    with exit_on(ValueError):
        check_arguments(options)
    rates, output = options.learning_rates, options.output_dir
    (Path(output) / "runs").mkdir(exist_ok=True)
    swept = [run_settings(options, *run) for run in product(options.methods, rates, options.sweep_seeds)]
    if len(rates) == 1:
        swept = []
    with Workers(options.jobs, len(swept) + len(options.methods) * len(options.seeds)) as workers:
        sweep = workers.run(output, swept)
        chosen = {}
        for method in options.methods:
            own = [run for run in sweep if run.method == method]
            if own or not swept:
                chosen[method] = best_learning_rate(own) if swept else rates[0]
                print(f"{method}: learning rate {chosen[method]:g}", flush=True)
        wanted = [run_settings(options, *run, seed) for run, seed in product(chosen.items(), options.seeds)]
        final = workers.run(output, [replace(one, training={**one.training, **(last or {})}) for one in wanted])
    finals = {method: [run for run in final if run.method == method] for method in chosen}
    return sweep, {method: runs for method, runs in finals.items() if runs}, workers


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    sweep, finals, workers = compare(options)
    if finals:
        write_results(options, sweep, finals)
    workers.end_if_failed()


if __name__ == "__main__":
    main(sys.argv[1:])
