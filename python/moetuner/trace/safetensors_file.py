"""moetuner's own trace file: safetensors with a versioned header.

Tensors carry the names of the fields of `Trace`; `topk_ids` is stored as uint8 when
every id fits and nothing is padded, else as int16. A source that only counted has
those of `CountTrace` instead. The header's string metadata says what the file is:
``format``, ``version``, ``num_experts``, ``ranked``, ``model``, ...
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moetuner._files import atomic_write_bytes
from moetuner.errors import InvalidTraceError
from moetuner.trace.model import CountTrace, Trace, TraceMetadata

if TYPE_CHECKING:
    import os

FORMAT = "moetuner.trace"
VERSION = "1"
_MAX_HEADER = 1 << 20
_MAX_TENSOR_ENTRIES = 1 << 12  # of the header, for the tensors themselves
_TENSORS = {
    "topk_ids": np.int16,
    "layer_ids": np.int32,
    "topk_weights": None,
    "sequence": np.int32,
    "position": np.int32,
    "home_rank": np.int16,
    "phase": np.uint8,
    "request": np.int32,
}
_FLAGS = {"true": True, "false": False}
_COUNT_TENSORS = {"counts": np.int64, "num_tokens": np.int64, "layer_ids": np.int32}


def write_trace(trace: Trace | CountTrace, path: str | os.PathLike[str]) -> None:
    """Write `trace` as a safetensors file; an existing file is replaced whole."""
    if isinstance(trace, CountTrace):
        _write_counts(trace, path)
        return
    # safetensors writes the memory of a strided array, not its elements.
    tensors = {n: np.ascontiguousarray(a) for n, a in trace.arrays().items()}
    ids = trace.topk_ids
    if trace.num_experts <= 256 and (not ids.size or ids.min() >= 0):
        tensors["topk_ids"] = ids.astype(np.uint8)
    header = header_of(
        trace.metadata,
        num_experts=str(trace.num_experts),
        ranked="true" if trace.ranked else "false",
    )
    _save(tensors, header, path)


def header_of(metadata: TraceMetadata, **fields: str) -> dict[str, str]:
    """The string metadata of a trace file.

    Raises
    ------
    InvalidTraceError
        When it is too long for a header.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        **fields,
        "model": metadata.model,
        "source": metadata.source,
        "dataset": metadata.dataset,
        "extra": json.dumps(dict(metadata.extra), sort_keys=True),
    }
    if len(json.dumps(header)) > _MAX_HEADER - _MAX_TENSOR_ENTRIES:
        raise InvalidTraceError(
            f"write_trace: the metadata must fit a header of {_MAX_HEADER} bytes; "
            f"shorten metadata.extra"
        )
    return header


def _write_counts(trace: CountTrace, path: str | os.PathLike[str]) -> None:
    tensors = {n: np.ascontiguousarray(getattr(trace, n)) for n in _COUNT_TENSORS}
    header = header_of(
        trace.metadata,
        num_experts=str(trace.num_experts),
        labels=json.dumps(list(trace.labels)),
        tokens_known="true" if trace.tokens_known else "false",
    )
    _save(tensors, header, path)


def _save(
    tensors: dict[str, Any], header: dict[str, str], path: str | os.PathLike[str]
) -> None:
    atomic_write_bytes(path, save(tensors, metadata=header))


def read_safetensors(path: str | os.PathLike[str]) -> Trace | CountTrace:
    """Read a trace written by `write_trace`.

    Raises
    ------
    InvalidTraceError
        When the file is truncated, foreign, of another version, or holds a trace
        that breaks the rules of `Trace` or `CountTrace`.
    """
    data = Path(path).read_bytes()
    header = _read_header(data, path)
    if header.get("format") != FORMAT:
        raise InvalidTraceError(
            f"{path}: a safetensors file, but not a routing trace: its metadata says "
            f"format={header.get('format')!r}, wanted {FORMAT!r}"
        )
    if header.get("version") != VERSION:
        raise InvalidTraceError(
            f"{path}: trace version {header.get('version')!r}; this moetuner reads "
            f"version {VERSION}"
        )
    try:
        tensors = load(data)
        metadata = _metadata(header)
        num_experts = int(header["num_experts"])
        ranked = _FLAGS[header.get("ranked", "false")]
        tokens_known = _FLAGS[header.get("tokens_known", "true")]
        labels = _labels(header)
    except (
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:
        raise InvalidTraceError(
            f"{path}: damaged trace file: {type(error).__name__}: {error}"
        ) from error
    try:
        if "counts" in tensors:
            trace = _count_trace(tensors, num_experts, labels, metadata)
            return replace(trace, tokens_known=tokens_known)
        return Trace(
            num_experts=num_experts,
            ranked=ranked,
            metadata=metadata,
            **_fields(tensors, _TENSORS, {"topk_ids", "layer_ids"}),
        )
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error


def _read_header(data: bytes, path: object) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_MAX_HEADER, len(data) - 8):
        raise InvalidTraceError(f"{path}: truncated, or not a safetensors file")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidTraceError(f"{path}: not a safetensors file: {error}") from error
    if not isinstance(metadata, dict):
        raise InvalidTraceError(f"{path}: damaged safetensors metadata")
    return metadata


def _metadata(header: dict[str, str]) -> TraceMetadata:
    extra = json.loads(header.get("extra", "{}"))
    if not isinstance(extra, dict):
        raise TypeError("metadata 'extra' must be a JSON object")
    return TraceMetadata(
        model=header.get("model", ""),
        source=header.get("source", ""),
        dataset=header.get("dataset", ""),
        extra={str(key): str(value) for key, value in extra.items()},
    )


def _labels(header: dict[str, str]) -> tuple[str, ...]:
    labels = json.loads(header.get("labels", "[]"))
    if not isinstance(labels, list):
        raise TypeError("metadata 'labels' must be a JSON list")
    return tuple(labels)


def _count_trace(
    tensors: dict[str, Any],
    num_experts: int,
    labels: tuple[str, ...],
    metadata: TraceMetadata,
) -> CountTrace:
    trace = CountTrace(
        labels=labels,
        metadata=metadata,
        **_fields(tensors, _COUNT_TENSORS, set(_COUNT_TENSORS)),
    )
    if trace.num_experts != num_experts:
        raise InvalidTraceError(
            f"num_experts is {num_experts}, but counts are of {trace.num_experts}"
        )
    return trace


def _fields(
    tensors: dict[str, Any], known: dict[str, Any], required: set[str]
) -> dict[str, Any]:
    unknown = sorted(set(tensors) - set(known))
    missing = sorted(required - set(tensors))
    if unknown or missing:
        raise InvalidTraceError(
            f"unknown tensors {unknown}, missing tensors {missing}; a trace has "
            f"{', '.join(known)}"
        )
    fields = {}
    for name, array in tensors.items():
        wanted = known[name]
        if name == "topk_ids" and array.dtype == np.uint8:
            array = array.astype(np.int16)
        if wanted is not None and array.dtype != wanted:
            raise InvalidTraceError(
                f"tensor {name} must be {np.dtype(wanted)}, got {array.dtype}"
            )
        fields[name] = np.ascontiguousarray(array)
    return fields
