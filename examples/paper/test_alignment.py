"""The page on the alignment's coverage is what its CSV says; the script runs."""

import csv
import sys
from pathlib import Path

import pytest

from examples.paper import alignment

PAGE = Path(alignment.__file__).with_suffix(".md").read_text()


def test_the_page_has_the_table_of_the_numbers():
    assert alignment.table() in PAGE


def test_the_shares_that_the_page_states():
    with open(alignment.RESULTS, newline="") as stream:
        rows = [
            {key: value if key == "rates" else float(value) for key, value in row.items()}
            for row in csv.DictReader(stream)
        ]
    often = [row["coverage"] for row in rows if row["speaks"] > alignment.FEWEST]
    assert len(often) == 105 and sum(0.91 <= share <= 0.975 for share in often) == 103
    wrong = [row["speaks"] * (1 - row["coverage"]) for row in rows if 0 < row["speaks"] <= alignment.FEWEST]
    assert round(max(wrong), 3) == 0.022
    assert all(abs(row["pooled"] - row["truth"]) < 0.02 for row in rows if row["rates"] not in ("0.02", "0.01"))


def test_the_script_writes_a_row_for_each_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alignment, "GROUP_SIZES", (8,))
    monkeypatch.setattr(alignment, "RATES", ("0.5",))
    monkeypatch.setattr(sys, "argv", ["alignment.py", "--repeats", "50", "--output", str(tmp_path / "a.csv")])
    alignment.main()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4
    assert "| 8 | 100%: " in capsys.readouterr().out


def test_a_wrong_number_of_runs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment.py", "--repeats", "70"])
    with pytest.raises(SystemExit):
        alignment.main()
    assert "--repeats 70 must be a multiple of 50" in capsys.readouterr().err
