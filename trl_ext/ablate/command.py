"""``python -m trl_ext ablate SCRIPT``: compares normalisations, or any option, on the user's own script.

In order: the script is tried (``check_script.py``), the plan is printed and fitted into the budget (``plan.py``), a
sweep on tuning seeds chooses each variant's learning rate (``rates.py``), the comparison trains every variant on every
seed, and the answer is written (``compare.py``, ``answer.py``, ``page.py``).
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from .check_script import check_manifest, check_script
from .compare import PLACEBO, differences, summarize
from .launch import SHARES_GPUS, Launcher, Progress, submit, write_commands
from .page import Found, log_rows, write_csv, write_json, write_page
from .plan import MORE_RATES, Plan, bytes_of_a_run, fit, parse_budget, seconds_of_a_run, tuning_seeds
from .rates import Choice, Scores, beyond, choose_rate, grid, predicted_factors, predicts_rates, sweep_scores
from .study import Result, Run, Variant, make_run
from .variants import make_variants, normalizations_of

METRICS = ("eval_accuracy", "eval_reward", "reward")  # the first one that the script logs
EPILOG = """The script's own arguments follow --, as in
  python -m trl_ext ablate train.py --normalization std mean --seeds 0 1 2 --budget 12h -- --model_name_or_path ...
Repeat an interrupted command to go on."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trl_ext ablate",
        description="Trains a script with several normalisations (or values of any option), each at a learning rate\n"
        "of its own, and compares them over seeds. The script isn't changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("script", help="a Python file, or module:function that makes a trainer from a CurvatureGRPOConfig")
    add(
        "--normalization",
        nargs="+",
        default=[],
        metavar="NAME",
        help="std, mean, power:alpha=0.5 ...; the first is the reference",
    )
    add("--vary", nargs="+", default=[], metavar="OPTION=A,B", help="values of any other option")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the comparison [0 1 2]")
    add("--tuning-seeds", type=int, default=2, metavar="N", help="how many other seeds choose the learning rates [2]")
    add(
        "--rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="the sweep's learning rates for every method; one: no sweep",
    )
    add("--factors", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="else: of the sweep's centre [0.5 1 2]")
    add("--no-placebo", action="store_true", help="without the first method's second sweep on other seeds")
    add("--budget", help="time of everything, as 12h: what doesn't fit is left out before anything is trained")
    add("--metric", help=f"of the trainer's log, higher is better [the first logged of {', '.join(METRICS)}]")
    add("--target", type=float, help="of the metric, to count steps, tokens and seconds to")
    add("--launcher", default="", help='starts the script, as "accelerate launch --num_processes 2" [python]')
    add("--jobs", type=int, default=1, help="runs at the same time on this machine [1]")
    add("--one-thread", action="store_true", help="one CPU thread a run, for small models")
    add(
        "--list",
        action="store_true",
        help="write the next runs' commands to commands.txt, to start anywhere; then repeat",
    )
    add("--submitit", nargs="+", metavar="NAME=VALUE", help="submit runs by submitit (SLURM), with its parameters")
    add("--output_dir", default="runs/ablation", help="[runs/ablation]")
    add("--json", metavar="FILE", help="also all numbers, as JSON")
    add("--plan", action="store_true", help="print the plan, train nothing but the timed steps")
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the tool's options and the script's arguments. Raises ``ValueError`` for a number out of its range."""
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser().parse_args(arguments[:cut])
    for name, values in (("seeds", options.seeds), ("rates", options.rates or []), ("factors", options.factors)):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"--{name} has {twice[0]} more than once")
    wrong = {
        f"--rates {options.rates}: learning rates must be above 0": any(not rate > 0 for rate in options.rates or []),
        f"--factors {options.factors} must be above 0": any(not factor > 0 for factor in options.factors),
        f"--jobs {options.jobs} must be at least 1": options.jobs < 1,
        f"--jobs {options.jobs} with --launcher {options.launcher}: it takes every GPU for one run": options.jobs > 1
        and any(name in options.launcher for name in SHARES_GPUS),
        "--submitit needs NAME=VALUE": any("=" not in one for one in options.submitit or []),
        f"--tuning-seeds {options.tuning_seeds} must be at least 1": options.tuning_seeds < 1,
        f"{options.script}: no such file": options.script.endswith(".py") and not Path(options.script).is_file(),
        f"{options.script} must be a Python file or module:function": ":" not in options.script
        and not options.script.endswith(".py"),
    }
    for message, broken in wrong.items():
        if broken:
            raise ValueError(message)
    return options, arguments[cut + 1 :]


@dataclass
class Study:
    """A study that goes on: its options, how runs are started, and the folder."""

    options: argparse.Namespace
    launcher: Launcher
    folder: Path
    variants: list[Variant]
    script_rate: float = 0.0
    metric: str = ""

    def trained(self, runs: Sequence[Run], progress: Progress) -> list[tuple[Run, Result]]:
        """Trains what has no result yet, and returns all results. Ends the program after ``--list``."""
        left = [run for run in runs if run.result() is None]
        progress.done += len(runs) - len(left)
        if left and self.options.list:
            file = self.folder / "commands.txt"
            write_commands(file, self.launcher, left)
            sys.exit(f"{len(left)} commands: {file}. Start them anywhere with this folder, then repeat this command")
        if left and self.options.submitit:
            parameters = dict(one.split("=", 1) for one in self.options.submitit)
            submit(self.launcher, left, self.folder / "submitit", parameters, progress.report)
        self.launcher.train(left, progress.report)
        results = [(run, run.result() or Result("failed", "it left no result")) for run in runs]
        if results and all(result.status == "failed" for _, result in results):
            raise ValueError(f"every run failed, for example {results[0][0].folder}: {results[0][1].error}")
        return results

    def runs(self, variant: Variant, rates: Sequence[float], seeds: Sequence[int]) -> list[Run]:
        """Returns a run for each rate and seed."""
        return [make_run(self.folder, variant, rate, seed) for rate in rates for seed in seeds]


def choose_metric(study: Study, timed: Result) -> str:
    """Returns ``--metric``, or the first one of ``METRICS`` that the timed steps logged."""
    logged = {name for entry in timed.logs for name in entry}
    wanted = [study.options.metric] if study.options.metric else list(METRICS)
    for name in wanted:
        if name in logged:
            return name
    raise ValueError(f"the script logs none of {', '.join(wanted)}; it logs {', '.join(sorted(logged))}")


@dataclass(frozen=True)
class Grid:
    """The learning rates at which the sweep trains a variant, on which seeds; ``centre``: where they come from."""

    name: str
    variant: Variant
    rates: Sequence[float]
    seeds: Sequence[int]
    centre: str


@dataclass
class Sweep:
    """The learning rates of all variants, by name, with the scores and runs that chose them."""

    study: Study
    progress: Progress
    choices: dict[str, Choice] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    runs: dict[str, list[tuple[Run, Result]]] = field(default_factory=dict)

    def choose(self, grids: Sequence[Grid], more_rates: int = 0) -> None:
        """Trains variants at these rates on tuning seeds, all together, and chooses the best of each.

        Where the best rate is at an edge, up to ``more_rates`` further ones are tried beyond it. Otherwise a method
        whose sweep happens to reach further would win by its rate.
        """
        self._train(grids)
        for _ in range(more_rates):
            at_edge = [one for one in grids if self.choices[one.name].at_edge]
            if not at_edge:
                break
            self.progress.total += sum(len(one.seeds) for one in at_edge)
            further = [beyond(self.scores[one.name], self.choices[one.name]) for one in at_edge]
            self._train([replace(one, rates=[rate]) for one, rate in zip(at_edge, further, strict=True)])
        for one in grids:
            edge = ", at the sweep's edge" if self.choices[one.name].at_edge else ""
            print(f"{one.name}: learning rate {self.choices[one.name].rate:g}{edge}", flush=True)

    def _train(self, grids: Sequence[Grid]) -> None:
        wanted = [self.study.runs(one.variant, one.rates, one.seeds) for one in grids]
        trained = self.study.trained([run for runs in wanted for run in runs], self.progress)
        results = {run.folder: result for run, result in trained}
        for one, runs in zip(grids, wanted, strict=True):
            swept = self.runs.setdefault(one.name, [])
            swept += [(run, results[run.folder]) for run in runs]
            self.scores[one.name] = sweep_scores(swept, self.study.metric)
            finals = sweep_scores(swept, self.study.metric, at_end=True)
            self.choices[one.name] = choose_rate(self.scores[one.name], finals, one.centre)

    def fix(self, name: str, rate: float) -> None:
        """Takes a rate that was given."""
        self.choices[name], self.scores[name] = Choice(rate, False, 0.0, "given"), {}

    def folders(self, name: str) -> list[Path]:
        return [run.folder / "trainer" for run, _ in self.runs[name]]


def choose_rates(study: Study, plan: Plan, timed: Result, progress: Progress) -> Sweep:
    """Sweeps learning rates: the first variant around the script's rate, the others around what follows from it."""
    first, *others = plan.variants
    sweep = Sweep(study, progress)
    if plan.rates == 1:
        for one in plan.variants:
            sweep.fix(one.name, study.script_rate)
        return sweep
    again = [(first.name + PLACEBO, first, plan.placebo_seeds)] if plan.placebo_seeds else []
    if rates := study.options.rates:
        everyone = [*((one.name, one, plan.tuning_seeds) for one in plan.variants), *again]
        sweep.choose([Grid(name, variant, rates, seeds, "given") for name, variant, seeds in everyone])
        return sweep
    factors = study.options.factors
    own = grid(study.script_rate, factors)
    swept = [(first.name, first, plan.tuning_seeds), *again]
    sweep.choose(
        [Grid(name, variant, own, seeds, "the script's rate") for name, variant, seeds in swept], plan.more_rates
    )
    predicted: Mapping[str, float] = {}
    if predicts_rates(timed.config):
        predicted = predicted_factors(sweep.folders(first.name), normalizations_of(plan.variants), first.name)
    grids = []
    for one in others:
        centre = sweep.choices[first.name].rate * predicted.get(one.name, 1.0)
        source = "predicted by what-if" if one.name in predicted else f"{first.name}'s rate"
        grids.append(Grid(one.name, one, grid(centre, factors), plan.tuning_seeds, source))
    sweep.choose(grids, plan.more_rates)
    return sweep


def make_plan(study: Study, timed: Result) -> Plan:
    """Returns the plan that fits into the budget."""
    options = study.options
    tuned = tuning_seeds(2 * options.tuning_seeds, options.seeds)
    rates = len(options.rates or options.factors)
    plan = Plan(
        variants=study.variants,
        rates=rates,
        seeds=options.seeds,
        tuning_seeds=tuned[: options.tuning_seeds],
        placebo_seeds=[] if options.no_placebo or rates == 1 else tuned[options.tuning_seeds :],
        run_seconds=seconds_of_a_run(timed),
        jobs=options.jobs,
        run_bytes=bytes_of_a_run(timed),
        more_rates=0 if options.rates or rates == 1 else MORE_RATES,
    )
    return fit(plan, parse_budget(options.budget) if options.budget else None)


def run_study(study: Study, command: str) -> Found | None:
    """Does everything. Returns None after ``--plan``."""
    options = study.options
    check_manifest(study.launcher, study.folder)
    print("The script is tried, and its first steps are timed.", flush=True)
    own_rate, timed = check_script(study.launcher, study.variants, options.seeds, study.folder)
    study.script_rate = options.rates[0] if options.rates else own_rate
    study.metric = choose_metric(study, timed)
    plan = make_plan(study, timed)
    print("\n".join(plan.lines()), flush=True)
    if options.plan:
        return None
    progress = Progress(plan.runs, options.jobs, study.metric)
    sweep = choose_rates(study, plan, timed, progress)
    by_name = {one.name: one for one in plan.variants}
    if plan.placebo_seeds:
        by_name[plan.variants[0].name + PLACEBO] = plan.variants[0]
    wanted = {name: study.runs(one, [sweep.choices[name].rate], plan.seeds) for name, one in by_name.items()}
    together = {run.folder: run for runs in wanted.values() for run in runs}  # a placebo may have the same runs
    results = {run.folder: (run, result) for run, result in study.trained(list(together.values()), progress)}
    compared = {name: [results[run.folder] for run in runs] for name, runs in wanted.items()}
    summaries, target = summarize(compared, sweep.choices, study.metric, options.target)
    write_csv(study.folder / "results.csv", log_rows("sweep", sweep.runs) + log_rows("comparison", compared))
    return Found(
        title=f"{Path(options.script).name}: {', '.join(one.name for one in plan.variants)}",
        command=command,
        metric=study.metric,
        target=target,
        steps=int(timed.config["max_steps"]),
        plan=plan,
        summaries=summaries,
        differences=differences(summaries),
        scores=sweep.scores,
        unpaired=unpaired_seeds(compared),
    )


def unpaired_seeds(compared: Mapping[str, Sequence[tuple[Run, Result]]]) -> list[int]:
    """Returns the seeds whose runs had different data, so that their differences aren't paired."""
    data: dict[int, set[str]] = {}
    for runs in compared.values():
        for run, result in runs:
            data.setdefault(run.seed, set()).update([result.data] if result.data else [])
    return sorted(seed for seed, found in data.items() if len(found) > 1)


def write_answers(found: Found, study: Study) -> None:
    """Prints the answers, and writes the page (where the report's packages are installed) and JSON."""
    print("\n" + "\n".join(found.sentences) + "\nNot tested: " + " ".join(found.untested))
    if find_spec("plotly") and find_spec("jinja2"):
        write_page(found, study.folder / "answer.html")
        print(f"Page: {study.folder / 'answer.html'}")
    else:
        print('No page: it needs pip install "curvature-grpo[report]"')
    print(f"Numbers: {study.folder / 'results.csv'}")
    if study.options.json:
        write_json(found, Path(study.options.json))
        print(f"JSON: {study.options.json}")


def main(arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that running scripts are ended too
    study = None
    try:
        options, script_arguments = parse(arguments)
        variants = make_variants(options.normalization, options.vary)
        folder = Path(options.output_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "study.lock")
        script = str(Path(options.script).resolve()) if options.script.endswith(".py") else options.script
        launcher = Launcher(script, script_arguments, options.launcher, options.jobs, options.one_thread)
        study = Study(options, launcher, folder, variants)
        lock.acquire(timeout=0)
        found = run_study(study, shlex.join(["python", "-m", "trl_ext", "ablate", *arguments]))
        if found is not None:
            write_answers(found, study)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except Timeout:
        sys.exit(f"error: another command is at work in {folder}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. What has finished is kept: repeat the command to go on")
    finally:
        if study is not None:
            study.launcher.stop()
            lock.release()
