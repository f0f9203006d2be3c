"""Reads the history and the configuration in the file that W&B keeps on disk, ``run-ID.wandb``, without W&B.

The file is LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB, in them pieces of records (CRC, length,
type). A record is a ``Record`` of wandb's ``wandb_internal.proto``: history = 2, with items = 1 of key = 1 or
nested_key = 2, and value_json = 16; config = 5, and in run = 17 config = 4, with update = 1 of the same items and
remove = 2. The other records, and what else the run's has (host, user, command), aren't looked at.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from .rows import Log, Row
from .wire import parts

MAGIC = b":W&B"
HEADER, BLOCK, PIECE = 7, 32768, 7  # bytes: of the file's header, a block, a piece's header
FULL, FIRST, LAST = 1, 2, 4  # a piece's types; 3: between the first and the last


def _records(data: bytes) -> Iterator[bytes]:
    """Yields whole records; what a killed run left of one at the end is dropped."""
    at, begun = HEADER, b""
    while at + PIECE <= len(data):
        left = BLOCK - at % BLOCK
        if left < PIECE:  # too small for a piece: filled with zeros
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + PIECE])
        piece = data[at + PIECE : at + PIECE + length]
        if len(piece) < length or not FULL <= kind <= LAST:
            return
        begun = piece if kind in (FULL, FIRST) else begun + piece
        if kind in (FULL, LAST):
            yield begun
        at += PIECE + length


def _items(message: bytes, number: int) -> Row:
    row: Row = {}
    for item in parts(message, number):
        name = "/".join(key.decode() for key in parts(item, 1) or parts(item, 2))
        for value in parts(item, 16):
            row[name] = json.loads(value)
    return row


def _configured(config: Row, changes: bytes) -> Row:
    """The configuration after a record of changes."""
    removed = {"/".join(key.decode() for key in parts(item, 1) or parts(item, 2)) for item in parts(changes, 2)}
    return {name: value for name, value in {**config, **_items(changes, 1)}.items() if name not in removed}


def read(file: Path) -> Log:
    """The log of a run's file."""
    rows: list[Row] = []
    config: Row = {}
    for record in _records(file.read_bytes()):
        rows += [_items(history, 1) for history in parts(record, 2)]
        for changes in parts(record, 5) + [one for run in parts(record, 17) for one in parts(run, 4)]:
            config = _configured(config, changes)
    return Log("W&B's file", file, rows, config=config)
