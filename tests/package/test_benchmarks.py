"""The benchmarks' table and files of hand-made rows, and what runs without ``--full``. Nothing is timed here."""

import json
import os
import re
import sys

import pytest
from processes import ROOT, start

sys.path.append(str(ROOT / "benchmarks"))

import ratios
from ratios import Ratios

ROWS = [
    Ratios("step", "lora", {"TRL / ours": 2.7812, "ours / floor": 1.0}),
    Ratios("head", "fp32 trainable", {"TRL / ours": 3.4, "ours / floor": 1.144}),
    Ratios("head", "fp32 frozen", {"TRL / ours": None, "ours / floor": 1.01}),
    Ratios("head", "all peers", {"torch cross entropy / ours": 9.96, "Liger / ours": None}),
]
FACTS = {"date": "2026-01-02 03:04 UTC", "torch": "2.13.0", "cores": 2}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0123, "0.012"), (1.0, "1.00"), (3.456, "3.46"), (45.67, "45.7"), (1024.4, "1024"), (6, "6.00")],
)
def test_numbers_have_three_digits(value, shown):
    assert ratios.number(value) == shown


def test_a_line_says_topic_case_and_values():
    assert ROWS[2].line() == "head: fp32 frozen: TRL / ours -   ours / floor 1.01"


def test_files_keep_all_digits_and_say_what_they_were_measured_on(tmp_path):
    as_json, as_markdown = ratios.save(ROWS, FACTS, tmp_path / "new" / "folder")
    found = json.loads(as_json.read_text())
    assert found["machine"] == FACTS
    assert [Ratios(**row) for row in found["rows"]] == ROWS
    text = as_markdown.read_text()
    row = "| fp32 frozen    |          - |         1.01 |"
    assert all(part in text for part in (found["about"], "torch: 2.13.0", row, "## Head", "## Step"))
    assert text.count("| case ") == 3  # two blocks of the head, one of the step


def test_machine_facts():
    facts = ratios.machine_facts()
    assert facts.keys() == {"date", "torch", "trl", "transformers", "device", "cores", "threads"}
    assert facts["threads"] > 0
    json.dumps(facts)


def collect() -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]
    sys.exit(pytest.main(["benchmarks/", "--benchmark-only", "--collect-only", "-q", "-p", "no:cacheprovider"]))


def test_the_default_cases_cover_every_topic(tmp_path):
    started = start(1, collect, folder=tmp_path, cwd=ROOT)
    assert started.finish() == [0], started.text()
    cases = [line for line in started.text().splitlines() if "::" in line]
    files = {case.split("::")[0] for case in cases}
    assert files == {f"benchmarks/test_{name}_bench.py" for name in ("head", "step", "interference", "normalize")}
    assert re.search(r"[1-9]\d* longer cases left out; with --full they run too", started.text())
