"""The package as one installs it: what the wheel holds, the examples with it, and its use in a fresh environment."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
from pages import ROOT, blocks

SOURCES = ("trl_ext", "grpo_kernels", "pyproject.toml", "README.md", "LICENSE")
needs_shared_object = pytest.mark.skipif("math" in sys.builtin_module_names, reason="math is built into this Python")


def run(*command, cwd, timeout=1500, **variables):
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools would take old files from a build folder that lies beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "sources" / name)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    run(*build, cwd=folder / "sources", PYTHONPATH="")
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_trainer_the_kernels_and_the_report_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert "trl_ext/report/page.html.jinja" in archive.namelist()
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trl_ext", "grpo_kernels"}
    assert {"trl_ext/trainer.py", "trl_ext/report/page.py", "grpo_kernels/head/linear_grpo_loss.py"} <= set(texts)
    for name, text in texts.items():
        assert "unittest" not in text and "import examples" not in text and "from examples" not in text, name


# A reward function that calls others in spawned processes, of all three kinds that a run may start. It needs `math` and
# `examples.tasks` in each of them.
WORKERS = """
import math
import multiprocessing

import multiprocess
from datasets import Dataset
from torch.utils.data import DataLoader

from examples.tasks.mixture import generate_exercises


def root(number):
    return math.sqrt(number)


def root_of_row(row):
    return {"root": root(row["number"])}


def roots(numbers):
    import math
    return [math.sqrt(number) for number in numbers]


def score(completions, **columns):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(root, [9.0]) == [3.0]
        assert len(pool.apply(generate_exercises, (4,))) == 4
    multiprocess.set_start_method("spawn", force=True)
    rows = Dataset.from_dict({"number": [4.0, 9.0]}).map(root_of_row, num_proc=2)
    assert rows["root"][:] == [2.0, 3.0]
    loader = DataLoader([4.0, 9.0], batch_size=2, num_workers=1, multiprocessing_context="spawn", collate_fn=roots)
    assert list(loader) == [[2.0, 3.0]]
    print("three kinds of workers")
    return [float(len(str(answer)) % 2) for answer in completions]
"""
ONE_STEP = [
    *("--reward", "workers:score", "--max_steps", "1", "--train_size", "8", "--eval_strategy", "no"),
    *("--save_strategy", "no", "--num_generations", "4", "--per_device_train_batch_size", "8", "--use_cpu", "true"),
]


@needs_shared_object
def test_the_examples_with_an_installed_wheel_and_spawned_workers(wheel, tiny_policy, tmp_path):
    """From the script's own folder, the worst place: its math.py must not become the standard library's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    shutil.copytree(ROOT / "examples", tmp_path / "checkout" / "examples")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "workers.py").write_text(WORKERS)
    (tmp_path / "own" / "where.py").write_text("import trl_ext\nprint(trl_ext.__file__)\n")
    paths = os.pathsep.join([str(tmp_path / "installed"), str(tmp_path / "own")])
    here = {"cwd": tmp_path / "checkout" / "examples", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    assert str(tmp_path / "installed") in run(sys.executable, "-m", "where", **here)
    options = [*ONE_STEP, "--model_name_or_path", tiny_policy, "--output_dir", tmp_path / "run"]
    printed = run(sys.executable, "math.py", *options, timeout=300, **here)
    assert printed.count("three kinds of workers") == 1
    assert "usage: train.py" in run(sys.executable, "ablation/train.py", "--help", **here)
    assert "usage: lab.py" in run(sys.executable, "paper/lab.py", "--help", **here)


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
    file = next(path for path in built if path.suffix == ".whl")
    alone = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # a checkout on the path would pass for what is installed
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{file}[report]", cwd=tmp_path, **alone)
    (snippet,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "mine.py").write_text(snippet)
    run(python, "mine.py", cwd=tmp_path, **alone)
    found = run(python, "-c", "import trl_ext; print(trl_ext.__file__)", cwd=tmp_path, **alone)
    assert str(tmp_path / "fresh") in found
    run(python, "-m", "trl_ext", "report", "runs/sums", "-o", "page.html", cwd=tmp_path, **alone)
    assert "Did it learn?" in (tmp_path / "page.html").read_text()
