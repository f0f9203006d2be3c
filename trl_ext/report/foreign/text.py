"""Reads logs that are texts: JSONL (verl, prime-rl, W&B, or any with a step), JSON (W&B, TRL's state) and CSV."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from pathlib import Path
from typing import Any

from .rows import Log, Row

# a chart of W&B's that was exported as CSV: "run - metric", and its range where points were averaged
CHART = re.compile(r"(?P<run>.+?) - (?P<metric>.+?)(?P<range>__MIN|__MAX)?")


def read(file: Path) -> Log:
    """The log of a text file. Raises ``ValueError`` where it is none."""
    content = file.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = content.decode(encoding, errors="replace").strip()
    if not text:
        raise ValueError("it is empty")
    if text[0] not in "{[":
        return Log("CSV", file, _csv_rows(text))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _jsonl(file, text)
    if isinstance(found, list):
        return Log("JSON", file, _dicts(found))
    if isinstance(found.get("log_history"), list):
        return Log("TRL's trainer_state.json", file, _dicts(found["log_history"]))
    if found and all(isinstance(column, dict) for column in found.values()):  # pandas' to_json()
        places = dict.fromkeys(place for column in found.values() for place in column)
        return Log("JSON", file, [{name: column.get(place) for name, column in found.items()} for place in places])
    if "_step" in found and "_wandb" in found:
        raise ValueError("it is W&B's summary, the last values alone: give the history, or the file run-ID.wandb")
    return _jsonl(file, text)


def _dicts(rows: list[Any]) -> list[Row]:
    return [row for row in rows if isinstance(row, dict)]


def _jsonl(file: Path, text: str) -> Log:
    rows: list[Row] = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # half a line, of a run that was killed
        if isinstance(row, dict):
            rows.append(row)
    if not rows:
        raise ValueError("neither JSON nor lines of JSON")
    # verl 0.9.1, verl/utils/tracking.py:544: {"step": step, "data": data}; orjson writes NaN and infinity as null
    if all(isinstance(row.get("data"), dict) and "step" in row for row in rows):
        return Log("verl's FileLogger", file, _verl_rows(rows), step="step")
    return Log("JSONL", file, rows)


def _verl_rows(rows: list[Row]) -> list[Row]:
    """Each row's data, with NaN in place of null, and its step."""
    data = ({name: math.nan if value is None else value for name, value in row["data"].items()} for row in rows)
    return [{**one, "step": row["step"]} for one, row in zip(data, rows, strict=True)]


def _csv_rows(text: str) -> list[Row]:
    lines = text.splitlines()
    delimiter = max(",;\t", key=lines[0].count)
    try:
        header, *values = csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:  # a cell of more than 131072 characters
        raise ValueError(f"neither JSON nor CSV: {error}") from None
    if not values or len(header) < 2:
        raise ValueError("neither JSON nor a table of several columns and rows")
    names = _chart_names(header)
    return [{names[i]: cell for i, cell in enumerate(row) if i in names} for row in values if len(row) == len(header)]


def _chart_names(header: list[str]) -> dict[int, str]:
    """Place of a column -> its name; of W&B's charts without the run's name and the ranges."""
    matches = [CHART.fullmatch(name) for name in header]
    if not all(matches[1:]):
        return dict(enumerate(header))
    found = {i: match for i, match in enumerate(matches) if match is not None and not match["range"]}
    runs = list(dict.fromkeys(match["run"] for match in found.values()))
    if len(runs) > 1:
        raise ValueError(f"it has the curves of several runs ({', '.join(runs)}): export one")
    return {0: header[0], **{i: match["metric"] for i, match in found.items()}}
