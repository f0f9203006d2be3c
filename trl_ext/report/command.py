"""``python -m trl_ext report`` makes a page of runs, and ``python -m trl_ext check`` prints what is wrong with them."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .read_run import Run
    from .verdicts import Diagnosis

RUN_HELP = (
    "a run's output_dir, which may still be going; or a log of another library (a file, or a folder with one): "
    "TensorBoard, W&B, trackio (project.db#run), JSONL of verl and prime-rl, JSON, CSV"
)
WIDTH = 100  # characters of a line that ``check`` prints


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trl_ext", description="Looks at runs of CurvatureGRPOTrainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one HTML file of one run, or of several side by side")
    report.add_argument("-o", "--output", help="the page (default: report.html in the first run's folder)")
    bundle_help = "a file below 5 MB to send to others, without prompts, answers and paths; compare reads it"
    report.add_argument("--bundle", action="store_true", help=bundle_help)
    report.add_argument("--with-texts", action="store_true", help="a bundle with prompts and answers")
    check_help = "verdicts: what is wrong, since when, what to do; exits 1 on a critical one, 2 on an error"
    check = commands.add_parser("check", help=check_help, description=check_help)
    for command in (report, check):
        command.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
        command.add_argument("--names", metavar="FILE", help='JSON, {"their name": "our name"}: metrics of other logs')
        command.add_argument("--json", metavar="FILE", help="also writes the numbers or verdicts as JSON")
    commands.add_parser("compare", help="what differs between two runs, of their bundles or folders")
    commands.add_parser("what-if", help="what every normalisation would have made of a run's steps")
    commands.add_parser("ablate", help="compares normalisations, or any option, on your own script")
    return parser.parse_args(arguments)


def writable(path: Path, suffix: str) -> Path:
    """Returns ``path``; raises ``ValueError`` if it can't be written or is a file of another kind."""
    from .read_run import STATE_FILE
    from .run_files import CONFIG_FILE

    if path.is_dir():
        raise ValueError(f"{path} can't be written: it is a folder")
    existed = path.exists()
    if existed and (path.suffix != suffix or path.name in (STATE_FILE, CONFIG_FILE)):
        raise ValueError(f"{path} is there already and isn't a report's: give a name that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror}") from None
    return path


def read_runs(folders: Sequence[str], names_file: str | None = None) -> list[Run]:
    """Reads runs, and puts the parent folder or the whole path in front of names that occur twice."""
    from .foreign.names import read_names
    from .read_run import read_run

    chosen = read_names(Path(names_file)) if names_file else None
    runs = [read_run(folder, chosen) for folder in folders]
    names = [run.name for run in runs]
    longer = [
        f"{run.folder.resolve().parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs
    ]
    return [
        replace(run, name=str(run.folder) if longer.count(name) > 1 else name)
        for run, name in zip(runs, longer, strict=True)
    ]


def default_page(run: Path, name: str = "report") -> Path:
    """report.html in a run's folder; beside a file, with its name."""
    return run / f"{name}.html" if run.is_dir() else run.with_name(f"{run.stem}.{name}.html")


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.command == "check":
        check(options)
    elif options.bundle or options.with_texts:
        bundle(options)
    else:
        report(options, shlex.join(["python", "-m", "trl_ext", *arguments]))


def report(options: argparse.Namespace, command: str) -> None:
    """Writes the page, and prints what its first screen says of each run; ``command`` is shown on the page."""
    check_packages()
    # numpy, torch, plotly: not for --help
    from .groups import group_runs
    from .numbers import report_numbers, untried_only
    from .page import build_page

    try:
        runs = read_runs(options.runs, options.names)
        output = writable(Path(options.output or default_page(runs[0].folder)), ".html")
        json_file = writable(Path(options.json), ".json") if options.json else None
        groups = group_runs(runs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for run in runs:
        for problem in run.problems:
            print(f"skipped: {problem}")
        if run.problems:
            print(f"{run.folder}: {len(run.problems)} skipped")
    numbers = untried_only([report_numbers(run, len(runs)) for run in runs])
    for run, one in zip(runs, numbers, strict=True):
        print(f"{one.run}, up to step {one.last_step}{f', {run.source}' if run.source else ''}:")
        for line in one.screen.lines():
            print(f"  {line}")
        for found in one.diagnosis.verdicts:
            print(f"  {found.level}: {found.title}, since step {found.onset}: {found.evidence}.")
    try:
        page = build_page(runs, groups, numbers, command).encode("utf-8", "replace")
        output.write_bytes(page)
        print(f"Page: {output} ({len(page) / 2**20:.1f} MB)")
        if json_file is not None:
            as_plain = [asdict(one) for one in numbers]
            json_file.write_text(json.dumps(as_plain if len(runs) > 1 else as_plain[0], indent=1, allow_nan=False))
            print(f"Numbers: {json_file}")
    except OSError as error:
        sys.exit(f"error: {error.filename or output} can't be written: {error.strerror}")


def check_packages() -> None:
    """Exits where a package is missing."""
    for module in ("plotly", "scipy"):
        if find_spec(module) is None:
            sys.exit(f'error: the report needs {module}: pip install "curvature-grpo[report]"')


def bundle(options: argparse.Namespace) -> None:
    """Writes the bundle of one run."""
    check_packages()
    from .bundle import build_bundle

    try:
        if len(options.runs) > 1 or not options.bundle or options.json:
            raise ValueError("a bundle is of one run: report RUN --bundle [--with-texts] [-o FILE.html]")
        (run,) = read_runs(options.runs, options.names)
        output = writable(Path(options.output or default_page(run.folder, "bundle")), ".html")
        page = build_bundle(run, options.with_texts)
        output.write_bytes(page)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    texts = "with prompts and answers" if options.with_texts else "without prompts, answers and paths"
    print(f"Bundle: {output} ({len(page) / 1e6:.1f} MB), {texts}")


def check(options: argparse.Namespace) -> None:
    """Prints the verdicts on each run, and exits with 1 if one is critical, with 2 if a folder can't be read."""
    from .verdicts import diagnose

    try:
        file = writable(Path(options.json), ".json") if options.json else None
        runs = read_runs(options.runs, options.names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = {run.name: diagnose(run) for run in runs}
    for i, run in enumerate(runs):
        for problem in run.problems:
            print(f"skipped: {problem}")
        print(("\n" if i else "") + "\n".join(verdict_lines(run.name, run.last_step, found[run.name], run.source)))
    if file is not None:
        file.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
        print(f"Verdicts: {file}")
    sys.exit(int(any(one.worst == "critical" for one in found.values())))


def verdict_lines(name: str, last_step: int, diagnosis: Diagnosis, source: str = "") -> list[str]:
    """The lines that ``check`` prints for one run. ``source``: ``Run.source``."""
    looked = len(diagnosis.clear) + len(diagnosis.verdicts)
    lines = [f"{name}, up to step {last_step}: {len(diagnosis.verdicts)} found, {looked} signatures looked at"]
    lines += textwrap.wrap(source, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    for one in diagnosis.verdicts:
        lines += ["", f"{one.level.upper()}: {one.title}, since step {one.onset} (confidence {one.confidence:.0%})"]
        for text in (f"{one.evidence}.", f"-> {one.remedy}"):
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
    if diagnosis.unknown:
        reasons: dict[str, list[str]] = {}
        for signature, reason in diagnosis.unknown.items():
            reasons.setdefault(reason, []).append(signature)
        lines += ["", "Can't be told:"]
        for reason, names in reasons.items():
            text = f"{', '.join(names)}: {reason}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return lines
