"""Recordings kept as NumPy archives.

Per token: ``experts`` [T, L, K] with ``seq``, ``pos``, ``layer_ids``, optional
``weights`` and ``meta`` (a JSON string). Counts only: ``counts`` or ``load`` [Q, L, E],
or several named [L, E] tables. Nothing is unpickled, and no array is loaded before
its declared shape was compared with the size that the archive says it has.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.model import CountTrace, Trace, TraceMetadata

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]

MAX_ARRAY_BYTES = 1 << 34
# Deflate packs at most about 1030:1; routing data stays far below this.
MAX_COMPRESSION = 1100


def read_npz(path: str | os.PathLike[str]) -> Trace | CountTrace:
    """Read a NumPy archive as a trace, or as counts when that is all it has.

    Raises
    ------
    InvalidTraceError
        When the archive is damaged, holds pickled objects, declares more than it
        contains, or has neither routing nor counts.
    """
    arrays = _load(path)
    try:
        if "experts" in arrays:
            return _per_token(arrays, Path(path))
        return _counts(arrays, Path(path))
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error


def _load(path: str | os.PathLike[str]) -> Arrays:
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise InvalidTraceError(
                        f"{path}: {member.filename!r} is not a NumPy array"
                    )
                arrays[member.filename[:-4]] = _load_member(archive, member)
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InvalidTraceError(f"{path}: damaged archive: {error}") from error
    except (NotImplementedError, RuntimeError) as error:
        raise InvalidTraceError(f"{path}: cannot unpack: {error}") from error
    return arrays


def _load_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """One array, after its header was seen to fit the member's size."""
    name = member.filename
    packed = max(member.compress_size, 1)
    if (
        member.file_size > MAX_ARRAY_BYTES
        or member.file_size > packed * MAX_COMPRESSION
    ):
        raise InvalidTraceError(
            f"{name} unpacks {packed} bytes to {member.file_size}: refused"
        )
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        reader = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = reader(stream)
        if dtype.hasobject:
            raise InvalidTraceError(f"{name} holds pickled objects: refused")
        declared = math.prod(shape) * dtype.itemsize
        if declared > member.file_size:
            raise InvalidTraceError(
                f"{name} declares {declared} bytes but has {member.file_size}"
            )
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(
            stream,
            allow_pickle=False,
        )
    return array


def _metadata(arrays: Arrays) -> dict[str, Any]:
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


def _per_token(arrays: Arrays, path: Path) -> Trace:
    ids = _integers("experts", arrays["experts"])
    if ids.ndim != 3:
        raise InvalidTraceError(
            f"experts must be [tokens, layers, top_k], got {list(ids.shape)}"
        )
    if ids.size and not (ids.min() >= -1 and ids.max() <= np.iinfo(np.int16).max):
        raise InvalidTraceError(f"experts has ids in {ids.min()}..{ids.max()}")
    ids = ids.astype(np.int16)
    meta = _metadata(arrays)
    num_experts = meta.get("experts", int(ids.max()) + 1 if ids.size else 1)
    if not isinstance(num_experts, int):
        raise InvalidTraceError(f"meta 'experts' must be a number, got {num_experts!r}")
    weights = arrays.get("weights")
    if weights is not None and weights.shape == ids.shape:
        # Sources list a token's experts in any order; ours puts the strongest first.
        order = np.argsort(-weights, axis=2, kind="stable")
        ids = np.take_along_axis(ids, order, axis=2)
        weights = np.take_along_axis(weights, order, axis=2)
    return Trace(
        topk_ids=np.ascontiguousarray(ids),
        num_experts=num_experts,
        layer_ids=_layer_ids(arrays, ids.shape[1]),
        topk_weights=weights,
        sequence=_optional_int32(arrays, "seq"),
        position=_optional_int32(arrays, "pos"),
        ranked=weights is not None,
        metadata=_trace_metadata(meta, path),
    )


def _counts(arrays: Arrays, path: Path) -> CountTrace:
    meta = _metadata(arrays)
    name = next((key for key in ("counts", "load") if key in arrays), None)
    labels: tuple[str, ...] = ()
    if name is not None:
        counts = _integers(name, arrays[name]).astype(np.int64)
        for key in ("themes", "domains"):
            if key in arrays:
                labels = tuple(str(label) for label in arrays[key])
    else:
        tables = {
            key: _integers(key, table)
            for key, table in arrays.items()
            if table.ndim == 2
        }
        if not tables or len({table.shape for table in tables.values()}) != 1:
            raise InvalidTraceError(
                f"no routing found: wanted 'experts' [tokens, layers, top_k], or "
                f"'counts' or 'load' [groups, layers, experts]; "
                f"the archive has {sorted(arrays)}"
            )
        counts = np.stack(list(tables.values())).astype(np.int64)
        labels = tuple(tables)
    if counts.ndim != 3 or not counts.size:
        raise InvalidTraceError(
            f"{name} must be [groups, layers, experts], got {list(counts.shape)}"
        )
    return CountTrace(
        counts=counts,
        num_tokens=_group_tokens(arrays, counts, meta),
        layer_ids=_layer_ids(arrays, counts.shape[1]),
        labels=labels,
        metadata=_trace_metadata(meta, path),
    )


def _group_tokens(
    arrays: Arrays, counts: NDArray[np.int64], meta: dict[str, Any]
) -> NDArray[np.int64]:
    """Tokens of each group: as recorded, else from top-k, else assignments."""
    if "tokens" in arrays:
        return _integers("tokens", arrays["tokens"]).astype(np.int64)
    assignments = counts[:, 0].sum(axis=1, dtype=np.int64)
    top_k = meta.get("topk", 1)
    if not isinstance(top_k, int) or top_k < 1:
        raise InvalidTraceError(f"meta 'topk' must be a number >= 1, got {top_k!r}")
    return np.asarray(assignments // top_k)


def _layer_ids(arrays: Arrays, num_layers: int) -> NDArray[np.int32]:
    for key in ("layer_ids", "layers"):
        if key in arrays:
            return _integers(key, arrays[key]).astype(np.int32)
    return np.arange(num_layers, dtype=np.int32)


def _optional_int32(arrays: Arrays, key: str) -> NDArray[np.int32] | None:
    return _integers(key, arrays[key]).astype(np.int32) if key in arrays else None


def _integers(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "iu":
        raise InvalidTraceError(f"{name} must be integers, got {array.dtype}")
    return array
