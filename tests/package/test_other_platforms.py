"""As on Windows and macOS: without Triton, fork and Linux's signals, in an encoding that isn't UTF-8."""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from conftest import ROOT

# what needs Linux: Triton, several processes, signals
LINUX = ("triton", "two_process", "processes import", "SIGKILL", "instruction_sets", "test_gpu", "simulated_trl")
QUICK = ("tests/unit/test_options.py", "tests/unit/test_advantages.py", "tests/equality/test_by_task.py")


def run(*tests: str) -> str:
    environment = {**os.environ, "PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/other_platform.py", "-q", "-W", "ignore", "--tb=short", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_every_module_is_imported_and_a_trainer_trains():
    assert " passed" in run(*QUICK)


@pytest.mark.nightly
def test_all_tests_that_need_no_linux():
    files = sorted(name for folder in ("unit", "equality") for name in glob(f"tests/{folder}/test_*.py", root_dir=ROOT))
    chosen = [name for name in files if not any(word in Path(ROOT, name).read_text() for word in LINUX)]
    assert len(chosen) > 30
    assert " passed" in run(*chosen)
