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
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from examples.ablation.curves import Run

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository's root, where `examples` is found
    # worker processes must not look for modules in the working directory: in examples/ a math.py lies
    os.environ["PYTHONSAFEPATH"] = "1"

DEMO_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
BUILT_IN = "small"


# Arguments -> the settings of each run


def make_parser(description: str, prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, prog=prog
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=["mean", "std"], help="normalizations, as std or power:alpha=0.5,eps=1e-4")
    add(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[5e-5, 1e-4, 2e-4, 4e-4],
        help="the sweep; a single one: no sweep",
    )
    add("--sweep_seeds", nargs="+", type=int, default=[100], help="seeds that choose the learning rates")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the comparison, other than the sweep's")
    add("--max_steps", type=int, default=60)
    add("--eval_every", type=int, default=10, help="steps between measurements of the held-out accuracy")
    add("--eval_size", type=int, default=128, help="held-out questions, four sampled answers each")
    add("--target_accuracy", type=float, default=0.7, help="held-out accuracy to count the steps to")
    add("--num_generations", type=int, default=8, help="answers to a prompt, of those of a step")
    add("--answers_per_step", type=int, default=128, help="answers of a step, to all its prompts")
    add("--reward_noise", type=float, default=0.0, help="share of the rewards in training that are flipped, 1 - reward")
    add(
        "--dataset", choices=("mixture", "arithmetic"), default="mixture", help="four unlike tasks, or arithmetic alone"
    )
    add("--levels", nargs="+", type=int, help="arithmetic's levels 1 to 5, see examples/math.py; default: 1 4")
    add("--optim", default="adamw_torch", help="as transformers names it; sgd: plain gradient steps, as in the theory")
    add("--max_grad_norm", type=float, default=1.0, help="clipping, which hides a method's scale; 0: none")
    add(
        "--interference_every",
        type=int,
        default=10,
        help="steps between measurements of interference, which curvature needs; 0: none",
    )
    add(
        "--model_name_or_path", default=BUILT_IN, help="folder of one policy for every seed; small: a built-in one each"
    )
    add("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    add("--output_dir", default="runs/ablation")
    return parser


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    return make_parser(__doc__ or "", "ablate.py").parse_args(arguments)


def parse_method(text: str) -> tuple[str, dict[str, float]]:
    """``power:alpha=0.5,eps=1e-4`` -> ``("power", {"alpha": 0.5, "eps": 1e-4})``."""
    name, _, listed = text.partition(":")
    options = {}
    for item in filter(None, listed.split(",")):
        key, equals, value = item.partition("=")
        try:
            options[key] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--methods {text}: {item!r} isn't option=number, as in power:alpha=0.5")
    return name, options


def check_options(options: argparse.Namespace, *, lists: Sequence[str], positive: Sequence[str]) -> None:
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
        raise ValueError(
            f"--seeds and --sweep_seeds share {', '.join(map(str, overlap))}: a learning rate chosen on a seed would "
            "flatter its method there"
        )
    if options.max_steps % options.eval_every:
        raise ValueError(
            f"--max_steps {options.max_steps} must be a multiple of --eval_every {options.eval_every}, so that the "
            "last step is measured"
        )
    answers = options.answers_per_step
    if options.num_generations < 2 or answers < options.num_generations or answers % options.num_generations:
        raise ValueError(
            f"--num_generations {options.num_generations} must be at least 2 and divide a step's {answers}"
        )
    if not 0 <= options.reward_noise < 0.5:
        raise ValueError(f"--reward_noise {options.reward_noise} must be in [0, 0.5)")
    if not 0 <= options.max_grad_norm < float("inf"):
        raise ValueError(f"--max_grad_norm {options.max_grad_norm} must be a finite number that is not negative")
    if not 0 < options.target_accuracy <= 1:
        raise ValueError(f"--target_accuracy {options.target_accuracy} must be in (0, 1]")


def check_arguments(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for what can be known to fail before anything is trained."""
    from examples.ablation.runs import training_config
    from examples.tasks.mixture import generate_exercises
    from trl_ext.checkpoints import check_output_dir
    from trl_ext.tasks.arithmetic import DEFAULT_LEVELS, generate_problems

    if find_spec("matplotlib") is None:
        raise ValueError("the plot needs matplotlib: pip install matplotlib")
    check_options(
        options,
        lists=["methods", "learning_rates", "sweep_seeds", "seeds"],
        positive=["max_steps", "eval_every", "eval_size", "jobs"],
    )
    check_numbers(options)
    if options.model_name_or_path != BUILT_IN and not (Path(options.model_name_or_path) / "config.json").is_file():
        raise ValueError(f"--model_name_or_path {options.model_name_or_path}: no folder with a config.json")
    if options.levels and options.dataset != "arithmetic":
        raise ValueError("--levels goes with --dataset arithmetic")
    if options.dataset == "mixture":
        generate_exercises(options.eval_size, split="held_out", seed=options.seeds[0])
    else:
        levels = tuple(options.levels or DEFAULT_LEVELS)
        generate_problems(options.eval_size, split="held_out", levels=levels, seed=options.seeds[0])
    for method in options.methods:
        training_config(run_settings(options, method, options.learning_rates[0], options.seeds[0]), options.output_dir)
    check_output_dir(options.output_dir)


def demo_training() -> dict[str, Any]:
    """Reads the trainer's options of the demo's recipe."""
    import yaml

    recipe = yaml.safe_load(DEMO_RECIPE.read_text())
    return {k: v for k, v in recipe.items() if k not in ("model_name_or_path", "dataset", "eval_size", "output_dir")}


def run_settings(options: argparse.Namespace, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """The demo's recipe with what the ablation changes. Two runs differ in method, learning rate and seed alone."""
    from trl_ext.tasks.arithmetic import DEFAULT_LEVELS

    recipe = demo_training()
    if options.dataset == "arithmetic":
        recipe["max_completion_length"] = 4
    name, kwargs = parse_method(method)
    training = {
        **recipe,
        "normalization": name,
        "normalization_kwargs": kwargs,
        "learning_rate": learning_rate,
        "seed": seed,
        "num_generations": options.num_generations,
        "per_device_train_batch_size": options.answers_per_step,
        "optim": options.optim,
        "max_grad_norm": options.max_grad_norm,
        "interference_every": options.interference_every,
        "max_steps": options.max_steps,
        "eval_steps": options.eval_every,
        "eval_on_start": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {
        "model": None if options.model_name_or_path == BUILT_IN else options.model_name_or_path,
        "dataset": options.dataset,
        "levels": list(options.levels or DEFAULT_LEVELS) if options.dataset == "arithmetic" else [],
        "train_size": 700,
        "eval_size": options.eval_size,
        "method": method,
        "training": training,
        **({"reward_noise": options.reward_noise} if options.reward_noise else {}),
    }


# Results -> files


def write_results(options: argparse.Namespace, sweep: list, finals: dict[str, list]) -> None:
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
    options: argparse.Namespace, last: Mapping[str, Any] | None = None
) -> tuple[list[Run], dict[str, list[Run]], list[str]]:
    """Trains all: the sweep, then each method at its best rate; the runs of both, the latter by method; what failed.

    ``last``: the trainer's options that only the runs at the best rates have. Ends the program where arguments are
    wrong, a worker is killed, or on Ctrl-C.
    """
    from examples.ablation.curves import best_learning_rate
    from examples.ablation.runs import Workers

    try:
        check_arguments(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    rates, output = options.learning_rates, options.output_dir
    (Path(output) / "runs").mkdir(exist_ok=True)

    swept = len(rates) > 1
    sweep_settings = [
        run_settings(options, *run) for run in product(options.methods, rates, options.sweep_seeds) if swept
    ]
    total = len(sweep_settings) + len(options.methods) * len(options.seeds)
    with Workers(options.jobs, total) as workers:
        sweep = workers.run(output, sweep_settings) if swept else []
        chosen = {}
        for method in options.methods:
            own = [run for run in sweep if run.method == method]
            if own or not swept:
                chosen[method] = best_learning_rate(own) if swept else rates[0]
                print(f"{method}: learning rate {chosen[method]:g}", flush=True)
        wanted = [
            run_settings(options, method, rate, seed) for method, rate in chosen.items() for seed in options.seeds
        ]
        for settings in wanted:
            settings["training"] |= last or {}
        final = workers.run(output, wanted)
    finals = {method: [run for run in final if run.method == method] for method in chosen}
    return sweep, {method: runs for method, runs in finals.items() if runs}, workers.failed


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    sweep, finals, failed = compare(options)
    if finals:
        write_results(options, sweep, finals)
    if failed:
        sys.exit(f"error: {len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
