"""Prints a table of ratios below pytest-benchmark's own: ours against each peer and the floor, from the same run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

ROWS: list[str] = []


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("ratios of medians, alternating in this run")
        for row in ROWS:
            terminalreporter.write_line(row)
