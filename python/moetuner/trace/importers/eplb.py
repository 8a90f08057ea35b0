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
    tables: list[NDArray[Any]] = []
    for done, path in enumerate(files):
        try:
            for array in _arrays(path):
                tables += _tables(array)
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
    return count_trace(_counts(tables, options), "EPLB weights", options)


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
        arrays = open_safetensors(path)
        if "phy2log" in arrays:
            raise InvalidTraceError(
                "EPLB's placement (phy2log), not loads: moetuner import-placement "
                "reads it"
            )
        yield from arrays.values()
    else:
        raise InvalidTraceError("neither .npy, .npz, safetensors nor a torch file")


def _tables(array: StoredArray | NDArray[Any]) -> list[NDArray[Any]]:
    """The array as matrices of loads; a long stack is folded in groups."""
    shape = array.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise InvalidTraceError(
            f"weights must be [layers, experts] or a stack of those, got {list(shape)}"
        )
    if len(shape) == 2:
        whole = array.read() if isinstance(array, StoredArray) else array
        return [_loads(whole)]
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
        groups[index * num_groups // shape[0]] += _loads(part)
    return groups


def _loads(weights: NDArray[Any]) -> NDArray[Any]:
    """The same, whole numbers as int64 and others as float64; refuses what is no load.

    Half precision cannot hold its own sums.
    """
    if weights.dtype.kind not in "iuf":
        raise InvalidTraceError(f"weights must be numbers, got {weights.dtype}")
    if weights.dtype.kind != "f":
        return whole_counts(weights)
    weights = weights.astype(np.float64)
    if not np.isfinite(weights).all():
        raise InvalidTraceError("weights must be finite numbers")
    if weights.size and weights.min() < 0:
        raise InvalidTraceError(f"weights must be >= 0, got {weights.min()}")
    return weights


def _counts(tables: list[NDArray[Any]], options: ImportOptions) -> NDArray[np.int64]:
    """Counts [Q, L, E] in the proportions of the loads, within and between groups."""
    loads = np.stack(tables)
    if loads.dtype.kind != "f":
        return whole_counts(loads)
    largest = float(loads.max())
    if not np.isfinite(largest):
        raise InvalidTraceError("weights must add up to finite numbers")
    whole = largest <= SCALED_TOTAL and (loads == np.floor(loads)).all()
    if whole and loads.sum(axis=2).max() <= SCALED_TOTAL:
        return whole_counts(loads)
    options.note("weights are averages: scaled to whole numbers")
    shares = loads / largest  # whose sums neither overflow nor vanish
    scaled = np.rint(shares * (SCALED_TOTAL / shares.sum(axis=2).max()))
    return np.asarray(scaled, np.int64)
