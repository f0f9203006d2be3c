"""What a benchmark case found, as a line, as a row of a table and in a file.

A case records one ``Ratios`` or more (the fixture ``record`` of ``conftest.py``); rows of a topic that have the same
values stand in one block of the table.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

TOPICS = {
    "head": "the loss and its gradients from hidden states; floor: the matrix products alone",
    "step": "a whole optimizer step; before: ours with every sequence in a row of its own; floor: matrix products",
    "interference": "what the prompts' gradients do to one another; floor: the same without looking at them",
    "normalisation": "rewards to advantages; peer: TRL's lines for its own, std; floor: a copy",
    "training": "whole runs to the same accuracy; floor: generation alone",
}
ABOUT = (
    "Ratios of times, medians of rounds in which the contenders take turns. TRL / ours: how much longer TRL takes; "
    "ours / floor: 1 is the floor. Absolute times mean nothing beside another run's; - was not measured."
)


@dataclass(frozen=True)
class Ratios:
    """One row: ``values`` are ratios by name (or what the name says); None where a peer isn't installed."""

    topic: str
    case: str
    values: dict[str, float | None]

    def line(self) -> str:
        found = "   ".join(f"{name} {number(value)}" for name, value in self.values.items())
        return f"{self.topic}: {self.case}: {found}"


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def blocks(rows: list[Ratios]) -> list[tuple[str, list[str], list[Ratios]]]:
    """Topic, names of the values and rows; topics in the order of ``TOPICS``, else in the order of the rows."""
    found: dict[tuple[str, tuple[str, ...]], list[Ratios]] = {}
    for row in sorted(rows, key=lambda row: list(TOPICS).index(row.topic)):
        found.setdefault((row.topic, tuple(row.values)), []).append(row)
    return [(topic, list(names), group) for (topic, names), group in found.items()]


def markdown(rows: list[Ratios], facts: dict[str, str | int | bool]) -> str:
    parts = ["# Ratios to peers and floors", ABOUT, "; ".join(f"{name}: {value}" for name, value in facts.items())]
    last_topic = None
    for topic, names, group in blocks(rows):
        if topic != last_topic:
            parts.append(f"## {topic.capitalize()}\n\n{TOPICS[topic][0].upper()}{TOPICS[topic][1:]}.")
        last_topic, lines = topic, []
        table = [["case", *names], *([row.case, *(number(row.values[name]) for name in names)] for row in group)]
        first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
        table.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in widths)])
        for case, *cells in table:
            aligned = "".join(f" {cell:>{width}} |" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"| {case:<{first}} |{aligned}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def machine_facts() -> dict[str, str | int | bool]:
    """What a reader needs to judge the numbers."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "trl": version("trl"),
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The model's name where Linux tells it, with the instructions torch uses."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def save(rows: list[Ratios], facts: dict[str, str | int | bool], folder: Path) -> tuple[Path, Path]:
    """``ratios.json`` (all digits) and ``ratios.md`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"about": ABOUT, "machine": facts, "rows": [asdict(row) for row in rows]}
    as_json, as_markdown = folder / "ratios.json", folder / "ratios.md"
    as_json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    as_markdown.write_text(markdown(rows, facts), encoding="utf-8")
    return as_json, as_markdown
