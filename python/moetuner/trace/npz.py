"""Recordings kept as NumPy archives.

Per token: ``experts`` [T, L, K] with ``seq``, ``pos``, ``layer_ids``, optional
``weights`` and ``meta`` (a JSON string). Counts only: ``counts`` or ``load`` [Q, L, E],
or several named [L, E] tables. Nothing is unpickled, and no array is loaded before
its declared shape was compared with the size that the archive says it has, and that
with the size of the file: the memory that reading takes is bounded by the latter.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.counts import counted
from moetuner.trace.model import MAX_EXPERTS, CountTrace, Trace, TraceMetadata
from moetuner.trace.shapes import plausible_loads
from moetuner.trace.unwritten import routing_layers, without_unwritten

if TYPE_CHECKING:
    from typing import IO

    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]

# Routing packs 2:1 to 5:1. Deflate reaches 1030:1, on nothing that we want to unpack;
# small archives may do so, because their constant columns are most of them.
MAX_COMPRESSION = 100
FREE_BYTES = 1 << 28
MAX_LAYERS = 1 << 16


def read_npz(path: str | os.PathLike[str]) -> Trace | CountTrace:
    """Read a NumPy archive as a trace, or as counts when that is all it has.

    Raises
    ------
    InvalidTraceError
        When the archive is damaged, holds pickled objects, declares more than it
        contains, or has neither routing nor counts.
    """
    arrays = load_arrays(path)
    try:
        if "experts" in arrays:
            trace = per_token_trace(arrays, Path(path))
            return trace if _has_layer_ids(arrays) else _without_dense(trace)
        return _counts(arrays, Path(path))
    except ValueError as error:
        raise InvalidTraceError(f"{path}: {error}") from error


def load_arrays(path: str | os.PathLike[str]) -> Arrays:
    """Every array of a NumPy archive by name, after the checks named above.

    Raises
    ------
    InvalidTraceError
        When the archive is damaged, holds pickled objects, or declares more than it
        contains.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                check_members(members, size)
                return {m.filename[:-4]: load_member(archive, m) for m in members}
        except InvalidTraceError as error:
            raise InvalidTraceError(f"{path}: {error}") from error
        except Exception as error:
            # zipfile and NumPy's header parser trip over damage in a dozen ways.
            raise InvalidTraceError(
                f"{path}: damaged archive: {type(error).__name__}: {error}"
            ) from error


def check_members(members: list[zipfile.ZipInfo], archive_bytes: int) -> None:
    """Refuse what is no list of arrays, or unpacks to far more than it is."""
    seen: set[str] = set()
    for member in members:
        if not member.filename.endswith(".npy"):
            raise InvalidTraceError(f"{member.filename!r} is not a NumPy array")
        if member.filename in seen:
            raise InvalidTraceError(f"{member.filename!r} is in the archive twice")
        seen.add(member.filename)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InvalidTraceError(
                f"{member.filename!r} must be stored or deflated, got method "
                f"{member.compress_type}"
            )
    packed = sum(member.compress_size for member in members)
    unpacked = sum(member.file_size for member in members)
    if packed > archive_bytes:
        raise InvalidTraceError(
            f"the members claim {packed} bytes of a file of {archive_bytes}"
        )
    if unpacked > FREE_BYTES + MAX_COMPRESSION * archive_bytes:
        raise InvalidTraceError(
            f"{archive_bytes} bytes would unpack to {unpacked}: refused"
        )


def load_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """One array, after its header was seen to fit the member's size."""
    name = member.filename
    with archive.open(member) as stream:
        _, _, dtype = read_header(name, stream, member.file_size)
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    if dtype.kind == "U" and array.nbytes:
        # NumPy would make Python strings of any four bytes; they break json and more.
        points = array.ravel().view(np.dtype("u4").newbyteorder(dtype.byteorder))
        if points.max() > sys.maxunicode:
            raise InvalidTraceError(f"{name} is not Unicode text")
    return array


def read_header(
    name: str, stream: IO[bytes], num_bytes: int
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of the array in `stream`, of `num_bytes` in all.

    Raises
    ------
    InvalidTraceError
        When it holds pickled objects, or declares another size than it has.
    """
    version = np.lib.format.read_magic(stream)
    reader = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = reader(stream)
    if dtype.hasobject:
        raise InvalidTraceError(f"{name} holds pickled objects: refused")
    if any(length < 0 for length in shape):
        raise InvalidTraceError(f"{name} declares the shape {list(shape)}")
    declared = math.prod(shape) * dtype.itemsize
    contents = num_bytes - stream.tell()
    if declared != contents:
        raise InvalidTraceError(f"{name} declares {declared} bytes, has {contents}")
    return shape, fortran, dtype


def recorded_experts(meta: dict[str, Any]) -> int | None:
    """The number of experts that an archive's ``meta`` says, if it does."""
    return _meta_number(meta, ("experts", "num_experts"))


def recorded_top_k(meta: dict[str, Any]) -> int | None:
    """Experts per token that an archive's ``meta`` says, if it does."""
    return _meta_number(meta, ("topk", "top_k", "num_experts_per_tok"))


def _meta_number(meta: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = meta.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidTraceError(f"meta {name!r} must be a number, got {value!r}")
        if not 1 <= value <= MAX_EXPERTS:
            raise InvalidTraceError(
                f"meta {name!r} must be a number in 1..{MAX_EXPERTS}, got {value!r}"
            )
        return value
    return None


def metadata_of(arrays: Arrays) -> dict[str, Any]:
    """What the archive's ``meta`` says, nothing where it has none."""
    if "meta" not in arrays:
        return {}
    try:
        meta = json.loads(str(arrays["meta"]))
    except (ValueError, RecursionError) as error:
        raise InvalidTraceError(f"meta is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise InvalidTraceError(
            f"meta must be a JSON object, got {type(meta).__name__}"
        )
    return meta


def _trace_metadata(meta: dict[str, Any], path: Path) -> TraceMetadata:
    return TraceMetadata(
        model=str(meta.get("model", "")),
        source=path.parent.resolve().name,
        dataset=str(meta.get("domain", path.stem)),
        extra={
            key: str(value)
            for key, value in meta.items()
            if key not in ("model", "experts", "topk")
        },
    )


def per_token_trace(arrays: Arrays, path: Path) -> Trace:
    """The arrays of a recording of tokens as a trace."""
    ids = _integers("experts", arrays["experts"], np.int16)
    if ids.ndim != 3:
        raise InvalidTraceError(
            f"experts must be [tokens, layers, top_k], got {list(ids.shape)}"
        )
    ids = without_unwritten(ids, ids.shape[1])
    meta = metadata_of(arrays)
    num_experts = recorded_experts(meta)
    if num_experts is None:
        num_experts = max(int(ids.max()) + 1, 1) if ids.size else 1
    weights = arrays.get("weights")
    if weights is not None:
        _check_weights(weights, ids)
        # Sources list a token's experts in any order; ours puts the strongest first.
        order = np.argsort(-weights, axis=2, kind="stable")
        ids = np.take_along_axis(ids, order, axis=2)
        weights = np.take_along_axis(weights, order, axis=2)
    return Trace(
        topk_ids=np.ascontiguousarray(ids),
        num_experts=num_experts,
        layer_ids=_layer_ids(arrays, ids.shape[1]),
        topk_weights=weights,
        sequence=_per_token_int32(arrays, "seq"),
        position=_per_token_int32(arrays, "pos"),
        ranked=weights is not None,
        metadata=_trace_metadata(meta, path),
    )


def _counts(arrays: Arrays, path: Path) -> CountTrace:
    meta = metadata_of(arrays)
    name = next((key for key in ("counts", "load") if key in arrays), None)
    labels: tuple[str, ...] = ()
    if name is not None:
        counts = _integers(name, arrays[name], np.int64)
        counts = counts[None] if counts.ndim == 2 else counts  # one group
        for key in ("themes", "domains"):
            if key in arrays:
                labels = _labels(key, arrays[key], counts)
    else:
        tables = {
            key: _integers(key, table, np.int64)
            for key, table in arrays.items()
            if table.ndim == 2
        }
        if not tables or len({table.shape for table in tables.values()}) != 1:
            raise InvalidTraceError(
                f"no routing found: wanted 'experts' [tokens, layers, top_k], or "
                f"'counts' or 'load' [groups, layers, experts]; "
                f"the archive has {sorted(arrays)}"
            )
        for key, table in tables.items():
            plausible_loads(table, f"{key!r}")
        counts, labels = np.stack(list(tables.values())), tuple(tables)
    if counts.ndim != 3 or not counts.size:
        raise InvalidTraceError(
            f"counts must be [groups, layers, experts], none of them empty, got "
            f"{list(counts.shape)}"
        )
    num_experts = recorded_experts(meta)
    if num_experts not in (None, counts.shape[2]):
        raise InvalidTraceError(
            f"meta says {amount(num_experts, 'expert')}, the counts are of "
            f"{counts.shape[2]}"
        )
    tokens = arrays.get("tokens")
    return counted(
        counts,
        layer_ids=_layer_ids(arrays, counts.shape[1]),
        top_k=recorded_top_k(meta),
        num_tokens=None if tokens is None else _integers("tokens", tokens, np.int64),
        labels=labels,
        metadata=_trace_metadata(meta, path),
    )


def _layer_ids(arrays: Arrays, num_layers: int) -> NDArray[np.int32]:
    if num_layers > MAX_LAYERS:
        raise InvalidTraceError(f"wanted at most {MAX_LAYERS} layers, got {num_layers}")
    for key in ("layer_ids", "layers"):
        if key in arrays:
            numbers = _integers(key, arrays[key], np.int32)
            if numbers.shape != (num_layers,):
                raise InvalidTraceError(
                    f"{key} must be [{num_layers}], one number per layer, got "
                    f"{list(numbers.shape)}"
                )
            return numbers
    return np.arange(num_layers, dtype=np.int32)


def _has_layer_ids(arrays: Arrays) -> bool:
    return "layer_ids" in arrays or "layers" in arrays


def _without_dense(trace: Trace) -> Trace:
    """The trace without layers at which no token has an expert."""
    routed = routing_layers(trace.topk_ids)
    if routed.all() or not routed.any():
        return trace
    weights = trace.topk_weights
    return replace(
        trace,
        topk_ids=np.ascontiguousarray(trace.topk_ids[:, routed]),
        layer_ids=trace.layer_ids[routed],
        topk_weights=None if weights is None else weights[:, routed],
    )


def _per_token_int32(arrays: Arrays, key: str) -> NDArray[np.int32] | None:
    return _integers(key, arrays[key], np.int32) if key in arrays else None


def _labels(
    name: str, array: NDArray[Any], counts: NDArray[np.int64]
) -> tuple[str, ...]:
    if array.dtype.kind != "U" or array.shape != counts.shape[:1]:
        raise InvalidTraceError(
            f"{name} must be text {list(counts.shape[:1])}, one per group, got "
            f"{array.dtype} {list(array.shape)}"
        )
    return tuple(str(label) for label in array)


def _check_weights(weights: NDArray[Any], ids: NDArray[np.int16]) -> None:
    if weights.shape != ids.shape or weights.dtype not in (np.float16, np.float32):
        raise InvalidTraceError(
            f"weights must be float16 or float32 {list(ids.shape)} like experts, got "
            f"{weights.dtype} {list(weights.shape)}"
        )


def _integers(name: str, array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """The array as `dtype`; refuses what is no integer or would not fit."""
    if array.dtype.kind not in "iu":
        raise InvalidTraceError(f"{name} must be integers, got {array.dtype}")
    if array.size:
        low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise InvalidTraceError(
                f"{name} has values {low}..{high}, beyond {np.dtype(dtype)}"
            )
    return array.astype(dtype, copy=False)
