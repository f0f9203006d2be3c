"""What ``pytest benchmarks/`` runs and tells: a choice of cases or all (``--full``), a line as each ends, one table."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import ratios  # from the folder above
from compare import alternate

HERE = Path(__file__).parent


def pytest_addoption(parser):
    group = parser.getgroup("ratios", "ratios to peers and floors")
    every = "run every benchmark case, over two hours on two cores; by default a choice of four"
    group.addoption("--full", action="store_true", help=every)
    folder = "folder of ratios.json and ratios.md (default: benchmarks/results)"
    group.addoption("--ratios-dir", type=Path, default=HERE / "results", metavar="DIR", help=folder)


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a benchmark case that only --full runs")
    # pytest-benchmark's own table has the seconds of single calls; --benchmark-verbose shows it
    config.option.benchmark_quiet = True
    config.pluginmanager.register(Reporter(config))


@pytest.fixture
def record(request):
    """``record(topic, case, values)`` adds a row of ratios; it counts when the case passes."""

    def call(topic: str, case: str, values: dict[str, float | None]) -> None:
        request.node.user_properties.append(("ratios", ratios.Ratios(topic, case, values)))

    return call


@pytest.fixture
def compare(benchmark, record):
    """``compare(topic, case, contenders, values)`` lets the contenders take turns and records ratios of their median
    seconds: ``values`` names two contenders for each; a ratio of one that isn't there is None."""

    def call(topic: str, case: str, contenders: dict, values: dict[str, tuple[str, str]], **timing) -> None:
        medians = alternate(contenders, **timing)
        benchmark.extra_info.update(medians)
        found = {name: medians[a] / medians[b] if a in medians else None for name, (a, b) in values.items()}
        record(topic, case, found)
        benchmark.pedantic(contenders["ours"], rounds=1)

    return call


@pytest.fixture
def full(request) -> bool:
    """Whether --full was given, for cases that take fewer rounds without."""
    return request.config.getoption("full")


class Reporter:
    """Leaves cases out, prints a line as each ends and saves what there is; the table comes at the end."""

    def __init__(self, config) -> None:
        self.config = config
        self.rows: list[ratios.Ratios] = []
        self.ended = self.chosen = self.left_out = 0
        self.facts, self.saved = None, ()

    @property
    def terminal(self):
        return self.config.pluginmanager.get_plugin("terminalreporter")

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(self, items):
        left_out = [] if self.config.getoption("full") else [item for item in items if item.get_closest_marker("full")]
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            self.config.hook.pytest_deselected(items=left_out)
        self.chosen, self.left_out = len(items), len(left_out)

    def pytest_report_collectionfinish(self):
        self.terminal.showfspath = False  # lines of ours, not dots after the files' names
        return self.what_is_left_out()

    def what_is_left_out(self) -> list[str]:
        told = f"{self.left_out} longer cases left out; with --full they run too (over two hours on two cores)"
        return [told] if self.left_out else []

    def pytest_report_teststatus(self, report):
        if report.when == "call" and report.outcome in ("passed", "failed"):
            return report.outcome, "", report.outcome.upper()  # no dot

    @pytest.hookimpl(trylast=True)  # after pytest's own line of -v
    def pytest_runtest_logreport(self, report):
        if report.when != "call" and not report.failed:
            return
        self.ended += report.when == "call"
        found = [value for name, value in report.user_properties if name == "ratios"] if report.passed else []
        self.rows += found
        lines = [row.line() for row in found] or [f"{report.nodeid} {report.outcome.upper()}"]
        for line in lines:
            self.terminal.write_line(f"[{self.ended}/{self.chosen}] {line}   ({report.duration:.0f} s)")
        self.terminal.flush()  # into a file, too
        if self.rows:  # also of a run that is killed
            self.facts = self.facts or ratios.machine_facts()
            self.saved = ratios.save(self.rows, self.facts, self.config.getoption("ratios_dir"))

    def pytest_terminal_summary(self):
        if self.rows:
            self.terminal.write_line("")
            self.terminal.write_line(ratios.markdown(self.rows, self.facts))
            self.terminal.write_line("saved: " + ", ".join(map(os.path.relpath, self.saved)))
        for line in self.what_is_left_out():
            self.terminal.write_line(line)
