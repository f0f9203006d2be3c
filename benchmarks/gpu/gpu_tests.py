"""``tests/unit/test_gpu.py``, a row for each test; one that has passed isn't run again."""

from __future__ import annotations

from pathlib import Path

from .record import Record
from .setting import Setting

ROOT = Path(__file__).parents[2]
CASE = "tests that need a GPU"


class Plugin:
    """Writes each test's outcome as it ends."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.settled = {row.contender for row in record.file.crashed}

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self.record.file.done + list(self.settled)]

    def pytest_runtest_logstart(self, nodeid, location):
        self.record.file.running = (CASE, nodeid)
        self.record.save()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            if report.outcome == "passed":
                self.record.file.done.append(report.nodeid)
            note = "" if report.outcome == "passed" else f"{report.outcome}: {str(report.longrepr)[-200:]}"
            self.record.add(CASE, report.nodeid, {report.outcome: 1.0, "s": report.duration}, note.replace("\n", " "))
        self.record.file.running = None


def measure(record: Record, setting: Setting) -> None:
    import pytest

    record.file.rows = [row for row in record.file.rows if row.values.get("passed")]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    code = pytest.main([*options, str(ROOT / "tests/unit/test_gpu.py")], plugins=[Plugin(record)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")
