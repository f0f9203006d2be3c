"""``python -m trl_ext report RUN [RUN ...]``: run folders -> one HTML file, figures, numbers."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .read_run import Run


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trl_ext", description="Looks at runs of CurvatureGRPOTrainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one HTML file of one run, or of several side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's output_dir; it may still be going")
    report.add_argument("-o", "--output", default="report.html", help="the page (default: report.html)")
    report.add_argument("--figures", metavar="DIR", help="also figures for a paper, as PDF and PNG")
    report.add_argument("--json", metavar="FILE", help="also the same numbers, as JSON")
    commands.add_parser("check", help="verdicts: what is wrong, since when, what to do; exits 1 on a critical one")
    commands.add_parser("what-if", help="what every normalisation would have made of a run's steps")
    return parser.parse_args(arguments)


def writable(path: Path, suffix: str) -> Path:
    """Raises ``ValueError`` where a file can't be written there, or another kind of file is, before any work."""
    from .read_run import STATE_FILE
    from .run_files import CONFIG_FILE

    if path.is_dir():
        raise ValueError(f"{path} can't be written: it is a folder")
    if path.exists() and (path.suffix != suffix or path.name in (STATE_FILE, CONFIG_FILE)):
        raise ValueError(f"{path} is there already and isn't a report's: give a name that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with open(path, "a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror}") from None
    return path


def writable_folder(path: Path) -> Path:
    """Raises ``ValueError`` where files can't be put into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--figures {path} is not a folder that can be written: {error.strerror}") from None
    return path


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Runs whose folders have the same name are told apart by their parents'."""
    from .read_run import read_run

    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    longer = [
        f"{run.folder.resolve().parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs
    ]
    return [
        replace(run, name=str(run.folder) if longer.count(name) > 1 else name)
        for run, name in zip(runs, longer, strict=True)
    ]


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    for module in ("plotly", "matplotlib", "scipy"):
        if find_spec(module) is None:
            sys.exit(f'error: the report needs {module}: pip install "curvature-grpo[report]"')
    # numpy, torch, plotly: not for --help
    from .figures import draw_figures
    from .groups import group_runs
    from .numbers import report_numbers
    from .page import build_page

    try:
        output = writable(Path(options.output), ".html")
        json_file = writable(Path(options.json), ".json") if options.json else None
        figures = writable_folder(Path(options.figures)) if options.figures else None
        runs = read_runs(options.runs)
        groups = group_runs(runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for run in runs:
        for problem in run.problems:
            print(f"skipped: {problem}")
        if run.problems:
            print(f"{run.folder}: {len(run.problems)} skipped")
    numbers = [report_numbers(run, len(runs)) for run in runs]
    for one in numbers:
        print(f"{one['run']}, up to step {one['last_step']}:")
        for line in one["summary"]:
            print(f"  {line}")
        for found in one["diagnosis"]["verdicts"]:
            print(f"  {found['level']}: {found['title']}, since step {found['onset']}: {found['evidence']}.")
    command = shlex.join(["python", "-m", "trl_ext", *arguments])
    try:
        page = build_page(runs, groups, numbers, command).encode("utf-8", "replace")
        output.write_bytes(page)
        print(f"Page: {output} ({len(page) / 2**20:.1f} MB)")
        if json_file is not None:
            json_file.write_text(json.dumps(numbers if len(numbers) > 1 else numbers[0], indent=1, allow_nan=False))
            print(f"Numbers: {json_file}")
        if figures is not None:
            files = draw_figures(groups, numbers, figures)
            print(f"Figures: {len(files)} files in {figures}")
    except OSError as error:
        sys.exit(f"error: {error.filename or output} can't be written: {error.strerror}")
