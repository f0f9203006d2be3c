"""Reads the scalars of TensorBoard's event files, without TensorBoard.

A file is a sequence of TFRecords (length, its CRC, data, its CRC); a record is an ``Event`` of tensorboard's
``event.proto``: step = 2, summary = 5. A ``Summary`` has values = 1 with tag = 1, simple_value = 2 (what PyTorch's
``SummaryWriter`` writes) or tensor = 8 (what TensorFlow writes).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from .rows import Log, Row
from .wire import fields, parts

FILES = "events.out.tfevents.*"
HOST = re.compile(r"([A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d)_.+")  # transformers' name of a folder: time_host
FORMATS = {1: "f", 2: "d"}  # TensorFlow's numbers of float and double


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC32C = _crc32c_table()


def masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecords have it: rotated right by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def is_event_file(start: bytes) -> bool:
    """Whether a file that begins with these 12 bytes holds TFRecords."""
    return len(start) >= 12 and masked_crc(start[:8]) == struct.unpack("<I", start[8:12])[0]


def _records(data: bytes) -> Iterator[bytes]:
    """Yields whole records; a run that still goes, or was killed, may have left a part of one at the end."""
    at = 0
    while at + 12 <= len(data) and is_event_file(data[at : at + 12]):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        if at + 16 + length > len(data):
            return
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def _scalar(value: bytes) -> tuple[str, float] | None:
    """(tag, number) of a summary's value; None for texts, images and histograms."""
    (tag,) = parts(value, 1) or [b""]
    for simple in parts(value, 2):
        if len(simple) != struct.calcsize("<f"):
            raise ValueError("a scalar that isn't a float")
        return tag.decode(), struct.unpack("<f", simple)[0]
    for tensor in parts(value, 8):
        form = FORMATS.get(next((found for number, found in fields(tensor) if number == 1), 0))  # type: ignore[arg-type]
        data = b"".join(parts(tensor, 4) or parts(tensor, 5) or parts(tensor, 6))
        if form and len(data) == struct.calcsize(form):
            return tag.decode(), struct.unpack(f"<{form}", data)[0]
    return None


def _rows(file: Path) -> Iterator[Row]:
    for record in _records(file.read_bytes()):
        found = dict(fields(record))
        summary = found.get(5)
        if isinstance(summary, bytes):
            scalars = [scalar for value in parts(summary, 1) if (scalar := _scalar(value)) is not None]
            yield {**dict(scalars), "step": found.get(2, 0)}


def read(files: list[Path]) -> Log:
    """The log of the event files of one folder: a run that went on has one for each time. Oldest first, by name."""
    rows = [row for file in sorted(files) for row in _rows(file)]
    return Log("TensorBoard's event files", files[0].parent, rows, step="step")


def run_name(folder: Path) -> str:
    """The folder's name, without the host that transformers appends to the time."""
    return HOST.sub(r"\1", folder.resolve().name)
