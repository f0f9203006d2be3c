"""The Markdown page of all parts: predictions beside measurements, then each part's rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ratios import number

from .part import PARTS
from .record import PartFile, Row, read

PREDICTIONS = Path(__file__).with_name("predictions.json")
ABOUT = (
    "Contenders take turns in one process; times are medians. TFLOP/s count the operations that the loss needs, not "
    "those that a contender does. Peak MiB of a head: beyond inputs and returned gradients; of a step: all, the model "
    "included. error: of gradients at a small size, relative to float64. - was not measured."
)


@dataclass(frozen=True)
class Prediction:
    """What was predicted of one value, and what it has to reach. ``contender`` ends a ``*``: any that starts so."""

    case: str
    contender: str
    value: str
    source: str
    predicted: float | None = None
    goal: float | None = None

    def matches(self, row: Row) -> bool:
        named = row.contender == self.contender or (
            self.contender.endswith("*") and row.contender.startswith(self.contender[:-1])
        )
        return row.case == self.case and named and self.value in row.values


def predictions() -> list[Prediction]:
    return [Prediction(**entry) for entry in json.loads(PREDICTIONS.read_text(encoding="utf-8"))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(rows: list[Row]) -> str:
    """Every prediction, with what was measured of it."""
    lines = []
    for one in predictions():
        found = [(row.contender, row.values[one.value]) for row in rows if one.matches(row)]
        contender, measured = min(found, key=lambda pair: pair[1]) if found else (one.contender.rstrip("*, "), None)
        cells = [number(value) for value in (one.predicted, one.goal, measured)]
        lines.append([one.case, f"{contender}: {one.value}", *cells, one.source])
    return table(["case", "what", "predicted", "goal", "measured", "source"], lines)


def shown(value: float | None) -> str:
    """Small ones by their order of magnitude."""
    return f"{value:.1e}" if value and abs(value) < 1e-2 else number(value)


def case_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = [[row.contender, *(shown(row.values.get(name)) for name in names), row.note] for row in rows]
    return table(["", *names, "note"], lines)


def tests_table(rows: list[Row]) -> str:
    """Counts, and what didn't pass."""
    counts = {name: sum(name in row.values for row in rows) for name in ("passed", "failed", "skipped")}
    first = ", ".join(f"{count} {name}" for name, count in counts.items())
    bad = [row for row in rows if "passed" not in row.values and "skipped" not in row.values]
    return "\n\n".join([first, *([case_table(bad)] if bad else [])])


def section(file: PartFile, key: str) -> str:
    stale = "" if file.key == key else "; of other code, versions or another device"
    parts = [f"## {file.name}", f"{file.state} in {file.seconds:.0f} s{stale}{'; ' + file.error if file.error else ''}"]
    for case in dict.fromkeys(row.case for row in file.all_rows):
        rows = [row for row in file.all_rows if row.case == case]
        parts += [f"**{case}**", tests_table(rows) if file.name == "tests" else case_table(rows)]
    return "\n\n".join(parts)


def markdown(files: list[PartFile], facts: dict[str, str | int], key: str) -> str:
    rows = [row for file in files for row in file.all_rows if file.key == key]
    missing = [name for name in PARTS if name not in {file.name for file in files}]
    parts = ["# On a GPU", "; ".join(f"{name}: {value}" for name, value in facts.items()), ABOUT]
    parts += ["## Predicted and measured", compared(rows), *(section(file, key) for file in files)]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def write(folder: Path, facts: dict[str, str | int], key: str) -> Path:
    files = [file for name in PARTS if (file := read(folder / f"{name}.json")) is not None]
    path = folder / "report.md"
    path.write_text(markdown(files, facts, key), encoding="utf-8")
    return path
