"""``python -m trl_ext report RUN [RUN ...]``: run folders -> one HTML file, figures, numbers."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .groups import group_runs
from .numbers import report_numbers
from .read_run import read_run


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trl_ext", description="Looks at runs of CurvatureGRPOTrainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one HTML file of one run, or of several side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's output_dir; it may still be going")
    report.add_argument("-o", "--output", default="report.html", help="the page (default: report.html)")
    report.add_argument("--figures", metavar="DIR", help="also figures for a paper, as PDF and PNG")
    report.add_argument("--json", metavar="FILE", help="also the same numbers, as JSON")
    return parser.parse_args(arguments)


def writable(path: Path) -> Path:
    """Raises ``ValueError`` where a file can't be written there, before any work."""
    if path.is_dir():
        raise ValueError(f"{path} can't be written: it is a folder")
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


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    for module in ("plotly", "matplotlib", "scipy"):
        if find_spec(module) is None:
            sys.exit(f'error: the report needs {module}: pip install "curvature-grpo[report]"')
    from .figures import draw_figures
    from .page import build_page

    try:
        output = writable(Path(options.output))
        json_file = writable(Path(options.json)) if options.json else None
        if options.figures and Path(options.figures).exists() and not Path(options.figures).is_dir():
            raise ValueError(f"--figures {options.figures} is not a folder")
        runs = [read_run(folder) for folder in options.runs]
        groups = group_runs(runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for run in runs:
        for problem in run.problems:
            print(f"skipped: {problem}")
        if run.problems:
            print(f"{run.folder}: {len(run.problems)} skipped")
    numbers = [report_numbers(run) for run in runs]
    for one in numbers:
        print(f"{one['run']}, up to step {one['last_step']}:")
        for line in one["summary"]:
            print(f"  {line}")
    command = shlex.join(["python", "-m", "trl_ext", *arguments])
    output.write_text(build_page(runs, groups, numbers, command), encoding="utf-8")
    print(f"Page: {output} ({output.stat().st_size / 2**20:.1f} MB)")
    if json_file is not None:
        json_file.write_text(json.dumps(numbers if len(numbers) > 1 else numbers[0], indent=1, default=str))
        print(f"Numbers: {json_file}")
    if options.figures:
        files = draw_figures(groups, numbers, Path(options.figures))
        print(f"Figures: {len(files)} files in {options.figures}")
