"""``python -m trl_ext what-if RUN``: what every normalisation would have made of a run's steps, as a table."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.load_function import load_function

if TYPE_CHECKING:
    from .what_if_table import WhatIfTable


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trl_ext what-if",
        description="What every normalisation would have made of a run's logged steps, without training anything.",
    )
    parser.add_argument("run", metavar="RUN", help="the run's output_dir; it may still be going")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="of grpo_kernels.METHODS; default: all stateless")
    parser.add_argument("--function", metavar="MODULE:NAME", help="and one of your own, f(rewards_PG, context)")
    parser.add_argument("--json", metavar="FILE", help="also the same numbers, as JSON")
    return parser.parse_args(arguments)


def raising_value_errors(function: Callable[..., Any], place: str) -> Callable[..., Any]:
    """Whatever it raises is a ``ValueError`` that names it."""

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"{place} raised {type(error).__name__}: {error}") from error

    return named


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; - for none."""
    return "-" if value is None else f"{value:.{digits}g}"


def counted(steps: int) -> str:
    """1 step, 2 steps."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def lines(table: WhatIfTable) -> list[str]:
    """What is printed."""
    steps, used = table.steps, table.used or "a normalisation that can't be made again"
    printed = [f"{table.run}: {counted(len(steps))} ({steps[0]} to {steps[-1]}), trained with {used}", ""]
    header = ("", "cosine", "length", "spread", "rate", "95 %", "steps")
    rows = [header]
    for name, one in table.by_cosine:
        rate = ("-", "") if one.rate is None else (number(one.rate.value), f"{one.rate.low:.2g} to {one.rate.high:.2g}")
        spread = f"{number(one.spread, 2)} {one.kind or ''}".rstrip()
        rows.append((name, f"{one.cos:.3f}", number(one.factor), spread, *rate, str(one.steps)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        printed.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    printed += [
        "",
        "cosine: with the step that was taken. length: along that step (median). spread: std of its log; up to 0.15 a",
        "learning rate, above a schedule. rate: best learning rate over std's, if curvature is the same in all",
        "directions; - where its steps aren't known to gain anything on other prompts than their own.",
        *table.remarks(),
    ]
    absent: dict[tuple[int, str], list[str]] = {}
    for name, why in table.absent.items():
        absent.setdefault(why, []).append(name)
    for (count, reason), names in absent.items():
        printed.append(f"{', '.join(names)}: not told in {counted(count)} ({reason}).")
    printed += [f"{counted(count)} left out: {reason}." for reason, count in table.skipped.items()]
    if (noise := table.noise) is not None:
        printed += [
            "",
            f"Noise, of {counted(noise.steps)}: between prompts {number(noise.between)}, within (answers) "
            f"{number(noise.within)}, of a prompt's squared gradient; with as many rollouts it is least at",
            f"{noise.advised:.1f} answers to a prompt ({noise.low:.1f} to {noise.high:.1f}, 90 %).",
        ]
    return printed


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    from grpo_kernels.normalize.methods import check_normalization

    from .command import writable
    from .read_run import read_run
    from .what_if_table import STATELESS, what_if_table

    try:
        for name in options.methods or []:
            check_normalization(name, **({"alpha": 1.0} if name == "power" else {}))
        file = writable(Path(options.json), ".json") if options.json else None
        methods = options.methods
        if options.function:
            own = raising_value_errors(load_function(options.function, "--function"), options.function)
            methods = [*(methods or STATELESS), own]
        run = read_run(options.run)
        table = what_if_table(run, methods)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for problem in run.problems:
        print(f"skipped: {problem}")
    print("\n".join(lines(table)))
    if file is not None:
        file.write_text(json.dumps(asdict(table), indent=1))
        print(f"Numbers: {file}")
