"""Routing traces: the file format, readers, and what one does with a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moetuner.errors import InvalidTraceError
from moetuner.trace.counts import with_top_k
from moetuner.trace.generator import TOPIC_PRESETS, TopicRouting, topic_trace
from moetuner.trace.model import CountTrace, Trace, TraceMetadata
from moetuner.trace.npz import read_npz
from moetuner.trace.safetensors_file import read_safetensors, write_trace
from moetuner.trace.split import (
    Split,
    merge_traces,
    select,
    split_by_sequence,
    subsample,
)

if TYPE_CHECKING:
    import os

__all__ = [
    "TOPIC_PRESETS",
    "CountTrace",
    "Split",
    "TopicRouting",
    "Trace",
    "TraceMetadata",
    "merge_traces",
    "read_trace",
    "select",
    "split_by_sequence",
    "subsample",
    "topic_trace",
    "with_top_k",
    "write_trace",
]


def read_trace(
    path: str | os.PathLike[str], *, top_k: int | None = None
) -> Trace | CountTrace:
    """Read a routing trace; the format is told by the file's content.

    Parameters
    ----------
    path
        A moetuner trace (safetensors) or a NumPy archive (``.npz``).
    top_k
        Experts per token, for counts whose source does not say it; tokens are then
        counted with it.

    Returns
    -------
    Trace or CountTrace
        A `CountTrace` when the source holds no tokens, only counts.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    InvalidTraceError
        When the file is neither, or damaged, or says another top-k; the message says
        why.
    """
    return with_top_k(_read(path), top_k)


def _read(path: str | os.PathLike[str]) -> Trace | CountTrace:
    file = Path(path)
    if file.is_dir():
        raise InvalidTraceError(f"{path}: a folder, wanted a trace file")
    with file.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(b"PK"):
        return read_npz(file)
    if start.startswith(b"\x93NUMPY"):
        raise InvalidTraceError(
            f"{path}: a single NumPy array; wanted an .npz archive or a safetensors "
            f"trace, which moetuner import makes of it"
        )
    if start[8:] == b"{":
        return read_safetensors(file)
    raise InvalidTraceError(
        f"{path}: neither a safetensors trace nor an .npz archive (starts with "
        f"{start[:4]!r})"
    )
