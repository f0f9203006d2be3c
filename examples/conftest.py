"""The fixtures of ``tests/conftest.py``, for the experiments' tests, and their scripts' command lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import mixed_policy, tiny_policy  # noqa: F401


@pytest.fixture
def launch():
    """Runs a script from ``examples/``, the worst place: its math.py must not become the standard library's."""

    def call(script, *arguments):
        command = [sys.executable, script, *map(str, arguments)]
        quiet = {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
        folder, environment = Path(__file__).parent, {**os.environ, **quiet}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return call
