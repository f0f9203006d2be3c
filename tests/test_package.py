"""The package as one installs it: built, checked, and used in a fresh environment without the checkout."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from test_docs import blocks

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **variables):
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.nightly
def test_a_wheel_in_a_fresh_environment(warm_policy, tmp_path):
    """Wheel and sdist pass twine; the wheel runs the README's snippet and the report."""
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--outdir", dist, cwd=ROOT)
    built = sorted(dist.iterdir())
    assert [path.name.split("-")[0] for path in built] == ["curvature_grpo"] * 2
    assert run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=tmp_path).count("PASSED") == 2

    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    wheel = next(path for path in built if path.suffix == ".whl")
    alone = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # a checkout on the path would pass for what is installed
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[report]", cwd=tmp_path, **alone)
    (snippet,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "mine.py").write_text(snippet)
    run(python, "mine.py", cwd=tmp_path, **alone)
    found = run(python, "-c", "import trl_ext; print(trl_ext.__file__)", cwd=tmp_path, **alone)
    assert str(tmp_path / "fresh") in found
    run(python, "-m", "trl_ext", "report", "runs/sums", "-o", "page.html", cwd=tmp_path, **alone)
    assert "Did it learn?" in (tmp_path / "page.html").read_text()
