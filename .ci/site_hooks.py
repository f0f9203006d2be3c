"""What ``mkdocs build`` makes besides the pages: the executed tutorial, a sample report and the table of options."""

import os
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
MADE = ROOT / "build" / "site-parts"  # outlives a build: made anew when its sources have changed
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def is_older(made: Path, *sources: Path) -> bool:
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def tutorial() -> Path:
    """docs/tutorial.py, run, as Markdown with what it printed."""
    source, notebook = ROOT / "docs" / "tutorial.py", MADE / "tutorial.ipynb"
    if is_older(MADE / "tutorial.md", source):
        run(sys.executable, "-m", "jupytext", "--to", "notebook", "--execute", "--output", str(notebook), str(source))
        run(sys.executable, "-m", "nbconvert", "--to", "markdown", str(notebook))
    return MADE / "tutorial.md"


def sample_report() -> Path:
    """The report of a short run of the demo."""
    page, folder = MADE / "report.html", MADE / "run"
    options = "--max_steps 60 --interference_every 5 --save_strategy no --logging_steps 1"
    report = ROOT / "trl_ext" / "report"
    if is_older(page, report / "page.html.jinja", report / "charts.py", ROOT / "examples" / "recipes" / "demo.yaml"):
        run(sys.executable, "examples/math.py", "--output_dir", str(folder), *options.split())
        run(sys.executable, "-m", "trl_ext", "report", str(folder), "-o", str(page))
    return page


def on_files(files, config):
    MADE.mkdir(parents=True, exist_ok=True)
    files.append(File.generated(config, "tutorial.md", content=tutorial().read_text()))
    files.append(File.generated(config, "sample/report.html", content=sample_report().read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    if "<!-- options -->" not in markdown:
        return markdown
    from trl_ext import options

    return markdown.replace("<!-- options -->", options.markdown())
