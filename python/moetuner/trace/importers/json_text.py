"""JSON of a recording: a value a line, or values over several lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_LINE_BYTES = 1 << 29
# A list of a thousand numbers takes a Python list of them; text does not grow.
MAX_LINE_VALUES = 1 << 24


def json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Length in bytes and content of each value of a file.

    A file whose first line is a whole value has one a line; any other is read whole,
    as one value or several behind one another.

    Raises
    ------
    InvalidTraceError
        When it is no JSON, or too long, or of too many values, to be unpacked.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.isspace():
                continue
            _check_size(line, f"{path}, line {number}")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not _may_go_on(line, number):
                    raise InvalidTraceError(
                        f"{path}, line {number}: not JSON: {error}; wanted one "
                        f"response, or one record, a line"
                    ) from error
                file.seek(0)
                yield from _whole(path, file.read(MAX_LINE_BYTES + 1))
                return
            yield len(line), value


def first_values(start: bytes, *, most: int = 16) -> list[Any]:
    """The first whole JSON values of a file's first bytes; damage ends them."""
    text = start.decode("utf-8", "ignore").lstrip()
    decoder = json.JSONDecoder()
    values: list[Any] = []
    while text and len(values) < most:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            break
        values.append(value)
        text = text[end:].lstrip()
    return values


def _may_go_on(line: bytes, number: int) -> bool:
    """Whether a first line is the beginning of a value of several lines."""
    return number == 1 and line.endswith(b"\n") and line.strip()[-1:] in b"{[,:"


def _whole(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Values that are written over several lines."""
    _check_size(data, str(path))
    decoder = json.JSONDecoder()
    try:
        text = data.decode().strip()
        while text:
            value, end = decoder.raw_decode(text)
            yield len(text[:end].encode()), value
            text = text[end:].lstrip()
    except (ValueError, RecursionError) as error:
        raise InvalidTraceError(f"{path}: not JSON: {error}") from error


def _check_size(data: bytes, where: str) -> None:
    if len(data) > MAX_LINE_BYTES:
        raise InvalidTraceError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_LINE_VALUES:
        raise InvalidTraceError(f"{where}: more than {MAX_LINE_VALUES} values")
