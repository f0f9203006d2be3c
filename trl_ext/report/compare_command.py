"""``python -m trl_ext compare A B``: what differs between two runs, of their bundles or folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import Found
    from .compare_runs import Difference


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trl_ext compare", description="What differs between two runs.")
    for name in ("first", "second"):
        parser.add_argument(name, help="a bundle (report --bundle), a run's output_dir, or another library's log")
    return parser.parse_args(arguments)


def difference_lines(found: Sequence[Difference]) -> list[str]:
    """A line for each number; a star where the interval excludes 0."""
    if not found:
        return ["No number can be compared: too few steps are in both logs."]
    width = max(len(one.label) for one in found)
    lines = [f"{'':{width}}  {'A':>9}  {'B':>9}  B less A, 95 %"]
    for one in found:
        change = f"{one.second - one.first:+.2g} [{one.low:+.2g}, {one.high:+.2g}]{' *' if one.told else ''}"
        lines.append(f"{one.label:{width}}  {one.first:9.3g}  {one.second:9.3g}  {change}")
    return lines


def verdict_lines(first: Sequence[Found], second: Sequence[Found]) -> list[str]:
    """What was found in one run alone, or in both."""
    titles = {one.title for one in first}, {one.title for one in second}
    lines = []
    for where, own, others in (("A", first, titles[1]), ("B", second, titles[0])):
        alone = [one for one in own if one.title not in others]
        lines += [f"Only {where}: {one.level}: {one.title}, since step {one.onset}" for one in alone]
    both = sorted(titles[0] & titles[1])
    return lines + ([f"Both: {', '.join(both)}"] if both else [])


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    from .bundle import read_either
    from .compare_runs import compare_runs
    from .configuration import shared_options
    from .groups import differences

    try:
        (first, of_first), (second, of_second) = (read_either(path) for path in (options.first, options.second))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for letter, run in (("A", first), ("B", second)):
        print(f"{letter}: {run.name}, up to step {run.last_step}")
    print("\n" + "\n".join(difference_lines(compare_runs(first, second))))
    verdicts = verdict_lines(of_first, of_second)
    if verdicts:
        print("\n" + "\n".join(verdicts))
    if first.config and second.config:
        rows = differences([replace(run, config=shared_options(run.config)) for run in (first, second)])
        print("\n" + "\n".join(f"{name}: {values[0] or '-'}, {values[1] or '-'}" for name, values in rows))
