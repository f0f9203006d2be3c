"""Makes the docs' sample reports: short runs of the demo, one healthy, the others sick on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
COMMON = "--interference_every 5 --save_strategy no --logging_steps 1"
# name of a run -> options; {runs}: the folder of all runs
RUNS = {
    "std": "--max_steps 60",
    "mean": "--max_steps 60 --normalization mean",
    # goes on with what the first run has learned: most groups are all right
    "dead-groups": (
        "--config examples/recipes/demo.yaml --model_name_or_path {runs}/std --prompt_style chat --instruction= "
        "--max_steps 40 --learning_rate 2e-5"
    ),
    # pays for long answers
    "reward-hacking": "--max_steps 60 --reward examples.tasks.hackable:long_answers --max_completion_length 24",
}
# page -> its runs
PAGES = {
    "report": ("std",),
    "dead-groups": ("dead-groups",),
    "reward-hacking": ("reward-hacking",),
    "two-normalisations": ("std", "mean"),
}
SOURCES = ("trl_ext/report/*", "examples/recipes/demo.yaml", "examples/tasks/hackable.py", ".ci/gallery.py")


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def is_older(made: Path, *sources: Path) -> bool:
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def sample_reports(folder: Path) -> dict[str, Path]:
    """Returns the page of each sample; what is older than its sources is made anew."""
    runs, sources = folder / "runs", [file for pattern in SOURCES for file in ROOT.glob(pattern)]
    pages = {name: folder / f"{name}.html" for name in PAGES}
    if any(is_older(page, *sources) for page in pages.values()):
        for name, options in RUNS.items():
            given = f"{COMMON} {options.format(runs=runs)}".split()
            run(sys.executable, "examples/math.py", "--output_dir", str(runs / name), *given)
        for name, page in pages.items():
            run(sys.executable, "-m", "trl_ext", "report", *(str(runs / one) for one in PAGES[name]), "-o", str(page))
    return pages
