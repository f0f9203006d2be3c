"""Decodes protobuf messages without their definitions: the fields of a message, by number."""

from __future__ import annotations

from collections.abc import Iterator

Field = tuple[int, int | bytes]  # number; a varint as an integer, anything else as its bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(message: bytes) -> Iterator[Field]:
    """Yields the fields of a message. Raises ``ValueError`` where it isn't one."""
    at = 0
    try:
        while at < len(message):
            key, at = _varint(message, at)
            number, kind = key >> 3, key & 7
            if kind == 0:
                value, at = _varint(message, at)
                yield number, value
                continue
            if kind == 2:
                size, at = _varint(message, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"not a protobuf message: wire type {kind}")
            if at + size > len(message):
                raise ValueError("a protobuf message that ends too early")
            yield number, message[at : at + size]
            at += size
    except IndexError:
        raise ValueError("a protobuf message that ends too early") from None


def parts(message: bytes, number: int) -> list[bytes]:
    """The values of one field that aren't varints: texts, messages and fixed-size numbers."""
    return [value for found, value in fields(message) if found == number and isinstance(value, bytes)]
