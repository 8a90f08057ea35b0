"""Rows of CSV, JSON lines and Parquet, as columns of Python values, in chunks."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError, MissingDependencyError
from moetuner.trace.importers.json_text import MAX_LINE_BYTES, json_values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK_ROWS = 1 << 14
MAX_CELLS = 1 << 26
_PARQUET = b"PAR1"


@dataclass(kw_only=True, slots=True)
class Chunk:
    """Some rows of a table.

    Parameters
    ----------
    rows
        Each row's values by the name of their column.
    facts
        What lines that are no routes (a header of the log) say.
    bytes_read
        Of the file, for progress.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    bytes_read: int = 0


def chunks_of(path: Path) -> Iterator[Chunk]:
    """The rows of a file in order.

    Raises
    ------
    InvalidTraceError
        When it is damaged, or no table.
    MissingDependencyError
        When Parquet is met without pyarrow.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(_PARQUET):
        yield from _parquet(path)
    elif start.lstrip().startswith((b"{", b"[")):
        yield from _json(path)
    else:
        yield from _csv(path)


def csv_header(start: bytes) -> list[str] | None:
    """The names of a CSV file's columns, from its first bytes; None if it has none."""
    line = start.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    if not text.strip() or "\0" in text:
        return None
    try:
        names = next(csv.reader([text.strip("\r")], delimiter=_delimiter(text)), [])
    except csv.Error:
        return None
    return names if len(names) > 1 and all(name.strip() for name in names) else None


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _csv(path: Path) -> Iterator[Chunk]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline(1 << 20)
            file.seek(0)
            csv.field_size_limit(1 << 24)
            reader = csv.DictReader(file, delimiter=_delimiter(header), strict=True)
            chunk = Chunk()
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidTraceError(
                        f"{path}, line {reader.line_num}: not as many values as the "
                        f"header has names"
                    )
                chunk.rows.append(row)
                if len(chunk.rows) == CHUNK_ROWS:
                    yield chunk
                    chunk = Chunk()
            chunk.bytes_read = path.stat().st_size
            yield chunk
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidTraceError(f"{path}: damaged CSV: {error}") from error


def _json(path: Path) -> Iterator[Chunk]:
    chunk = Chunk()
    for number, (length, value) in enumerate(json_values(path), start=1):
        chunk.bytes_read += length
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise InvalidTraceError(
                    f"{path}, line {number}: a route must be a JSON object, got "
                    f"{type(row).__name__}"
                )
            chunk.rows.append(row)
        if len(chunk.rows) >= CHUNK_ROWS:
            yield chunk
            chunk = Chunk()
    yield chunk


def _parquet(path: Path) -> Iterator[Chunk]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: Parquet is read with pyarrow: pip install 'moetuner[parquet]'"
        ) from error
    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            meta = file.metadata
            unpacked = sum(
                meta.row_group(g).total_byte_size for g in range(meta.num_row_groups)
            )
            if unpacked > MAX_LINE_BYTES + 100 * size or meta.num_rows > MAX_CELLS:
                raise InvalidTraceError(
                    f"{path}: {size} bytes would unpack to {unpacked} bytes, "
                    f"{meta.num_rows} rows: refused"
                )
            facts = _facts(meta.metadata)
            for batch in file.iter_batches(CHUNK_ROWS):
                yield Chunk(rows=batch.to_pylist(), facts=facts)
            yield Chunk(bytes_read=size)
    except InvalidTraceError:
        raise
    except Exception as error:  # pyarrow meets damage in a dozen ways
        reason = str(error).partition("\n")[0]
        raise InvalidTraceError(
            f"{path}: damaged Parquet: {type(error).__name__}: {reason:.200}"
        ) from error


def _facts(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Numbers among a Parquet file's own key-value pairs."""
    facts: dict[str, Any] = {}
    for key, value in (metadata or {}).items():
        try:
            facts[key.decode()] = json.loads(value)
        except (ValueError, RecursionError, UnicodeDecodeError):
            continue
    return facts
