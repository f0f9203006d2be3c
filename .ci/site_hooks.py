"""What ``mkdocs build`` makes besides the pages: the executed tutorial, the sample reports and the table of options."""

import sys
from pathlib import Path

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from gallery import ROOT, is_older, run, sample_reports

MADE = ROOT / "build" / "site-parts"  # outlives a build: made anew when its sources have changed


def tutorial() -> Path:
    """docs/tutorial.py, run, as Markdown with what it printed."""
    source, notebook = ROOT / "docs" / "tutorial.py", MADE / "tutorial.ipynb"
    if is_older(MADE / "tutorial.md", source):
        run(sys.executable, "-m", "jupytext", "--to", "notebook", "--execute", "--output", str(notebook), str(source))
        run(sys.executable, "-m", "nbconvert", "--to", "markdown", str(notebook))
    return MADE / "tutorial.md"


def on_files(files, config):
    MADE.mkdir(parents=True, exist_ok=True)
    files.append(File.generated(config, "tutorial.md", content=tutorial().read_text()))
    for name, page in sample_reports(MADE).items():
        files.append(File.generated(config, f"sample/{name}.html", content=page.read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    if "<!-- options -->" not in markdown:
        return markdown
    from trl_ext import options

    return markdown.replace("<!-- options -->", options.markdown())
