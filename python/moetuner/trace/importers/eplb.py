"""Expert loads as EPLB takes them: ``weight`` [layers, experts], or a stack of those.

From ``.npy``, ``.npz``, ``.safetensors`` or ``.pt``; each matrix is a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import (
    MAX_GROUPS,
    MAX_TABLE_BYTES,
    count_trace,
    whole_counts,
)
from moetuner.trace.importers.stored import StoredArray, open_npy, open_safetensors
from moetuner.trace.importers.torch_file import is_torch_file, read_torch_file
from moetuner.trace.npz import load_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.model import CountTrace

SCALED_TOTAL = 2**40
"""What a layer's loads add up to when they are no whole numbers."""


def read_eplb_weights(files: Sequence[Path], options: ImportOptions) -> CountTrace:
    """Loads [L, E] of one or more files; averages are scaled to whole numbers."""
    tables: list[NDArray[np.int64]] = []
    for done, path in enumerate(files):
        try:
            for array in _arrays(path):
                tables += _tables(array, options)
        except InvalidTraceError as error:
            text = str(error)
            raise InvalidTraceError(
                text if text.startswith(str(path)) else f"{path}: {text}"
            ) from error
        options.progress(done + 1, len(files))
    shapes = sorted({table.shape for table in tables})
    if len(shapes) != 1:
        raise InvalidTraceError(
            f"EPLB weights: wanted matrices [layers, experts] of one shape, got "
            f"{[list(shape) for shape in shapes][:8]}"
        )
    return count_trace(np.stack(tables), "EPLB weights", options)


def _arrays(path: Path) -> Iterator[StoredArray | NDArray[Any]]:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"\x93NUMPY"):
        yield open_npy(path)
    elif start.startswith(b"PK") and not is_torch_file(path):
        yield from (a for a in load_arrays(path).values() if a.ndim in (2, 3))
    elif start.startswith(b"PK"):
        content = read_torch_file(path)
        found = content.values() if isinstance(content, dict) else [content]
        yield from (a for a in found if isinstance(a, StoredArray))
    elif start[8:] == b"{":
        yield from open_safetensors(path).values()
    else:
        raise InvalidTraceError("neither .npy, .npz, safetensors nor a torch file")


def _tables(
    array: StoredArray | NDArray[Any], options: ImportOptions
) -> list[NDArray[np.int64]]:
    """The array as matrices of counts; a long stack is folded in groups."""
    shape = array.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise InvalidTraceError(
            f"weights must be [layers, experts] or a stack of those, got {list(shape)}"
        )
    if len(shape) == 2:
        whole = array.read() if isinstance(array, StoredArray) else array
        return [_counts(whole, options)]
    num_groups = min(shape[0], MAX_GROUPS)
    if 8 * num_groups * shape[1] * shape[2] > MAX_TABLE_BYTES:
        raise InvalidTraceError(f"weights {list(shape)} are too large a table")
    groups = [np.zeros(shape[1:], np.float64) for _ in range(num_groups)]
    for index in range(shape[0]):
        part = (
            array.read(index, index + 1)[0]
            if isinstance(array, StoredArray)
            else array[index]
        )
        if part.dtype.kind not in "iuf":
            raise InvalidTraceError(f"weights must be numbers, got {part.dtype}")
        groups[index * num_groups // shape[0]] += part
    return [_counts(group, options) for group in groups]


def _counts(weights: NDArray[Any], options: ImportOptions) -> NDArray[np.int64]:
    if weights.dtype.kind == "f" and np.isfinite(weights).all() and weights.size:
        if weights.min() < 0:
            raise InvalidTraceError(f"weights must be >= 0, got {weights.min()}")
        total = weights.sum(axis=1, dtype=np.float64).max()
        if (weights != np.floor(weights)).any() or total > SCALED_TOTAL:
            options.note("weights are averages: scaled to whole numbers")
            return np.asarray(np.rint(weights * (SCALED_TOTAL / total)), np.int64)
    return whole_counts(weights)
