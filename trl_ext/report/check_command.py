"""``python -m trl_ext check RUN [RUN ...]``: verdicts on runs; exits 1 on a critical one."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .verdicts import Diagnosis

WIDTH = 100


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trl_ext check",
        description="What is wrong with a run, since when, what to do. Exits 1 on a critical verdict, 2 on an error.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output_dir; it may still be going")
    parser.add_argument("--json", metavar="FILE", help="also as JSON, by run")
    return parser.parse_args(arguments)


def lines(name: str, last_step: int, diagnosis: Diagnosis) -> list[str]:
    """What is printed of a run."""
    looked = len(diagnosis.clear) + len(diagnosis.verdicts)
    told = [f"{name}, up to step {last_step}: {len(diagnosis.verdicts)} found, {looked} signatures looked at"]
    for one in diagnosis.verdicts:
        told += ["", f"{one.level.upper()}: {one.title}, since step {one.onset} (confidence {one.confidence:.0%})"]
        for text in (f"{one.evidence}.", f"-> {one.remedy}"):
            told += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
    if diagnosis.unknown:
        reasons: dict[str, list[str]] = {}
        for signature, reason in diagnosis.unknown.items():
            reasons.setdefault(reason, []).append(signature)
        told += ["", "Can't be told:"]
        told += [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return told


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    from .command import read_runs, writable
    from .verdicts import diagnose

    try:
        file = writable(Path(options.json), ".json") if options.json else None
        runs = read_runs(options.runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = {run.name: diagnose(run) for run in runs}
    for i, run in enumerate(runs):
        for problem in run.problems:
            print(f"skipped: {problem}")
        print(("\n" if i else "") + "\n".join(lines(run.name, run.last_step, found[run.name])))
    if file is not None:
        file.write_text(json.dumps({name: one.as_plain() for name, one in found.items()}, indent=1))
        print(f"Verdicts: {file}")
    sys.exit(int(any(one.worst == "critical" for one in found.values())))
