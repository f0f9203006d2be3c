"""Reads a project's database of trackio: SQLite.

It has a row of ``metrics`` for each call of ``trackio.log``, and one of ``configs`` for each run.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from .rows import Log

MAGIC = b"SQLite format 3\0"


def _configs(database: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    """Run -> its configuration, the latest where it went on."""
    try:
        found = database.execute("SELECT run_name, config FROM configs ORDER BY id").fetchall()
    except sqlite3.OperationalError:
        return {}  # older databases have no such table
    configs = {}
    for name, text in found:
        try:
            config = json.loads(text)
        except (ValueError, TypeError):
            continue  # the metrics don't need it
        if isinstance(config, dict):
            configs[name] = config
    return configs


def _metrics(text: Any) -> dict[str, Any]:
    """A row's metrics; none where they can't be read."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def read(file: Path, run: str = "") -> Log:
    """The log of a run of the database, of the only one where ``run`` is empty.

    Raises ``ValueError`` where the database isn't trackio's, has several runs, or not this one.
    """
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
            configs = _configs(database)
    except sqlite3.Error as error:
        raise ValueError(f"{file} is a database, but not trackio's: {error}") from None
    runs = list(dict.fromkeys(str(name) for name, _, _ in found))
    if run and run not in runs:
        raise ValueError(f"{file} has no run {run!r}: it has {', '.join(runs)}")
    if not run and len(runs) > 1:
        raise ValueError(f"{file} has {len(runs)} runs, {', '.join(runs)}: give one as {file}#{runs[0]}")
    rows = [{**_metrics(text), "_step": step} for name, step, text in found if str(name) == run or not run]
    return Log("trackio's database", file, rows, config=configs.get(run or runs[0], {}) if runs else {})
