"""Expert loads as EPLB takes them: ``weight`` [layers, experts], or a stack of those.

From the files that `loads` reads; each matrix is a group. Or loads by rank [layers,
ranks, experts of a rank], as vllm-ascend keeps them: those are of physical slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.averages import whole_loads
from moetuner.trace.importers.base import MAX_GROUPS, MAX_TABLE_BYTES
from moetuner.trace.importers.counting import count_trace, whole_counts
from moetuner.trace.importers.loads import Loads, tables_of
from moetuner.trace.importers.stored import StoredArray
from moetuner.trace.shapes import check_layers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.model import CountTrace


def read_eplb_weights(files: Sequence[Path], options: ImportOptions) -> CountTrace:
    """Loads [L, E] of one or more files; averages become whole numbers."""
    found = [loads for path in files for loads in _of_file(path)]
    tables = [table for loads in found for table in _tables(loads.table)]
    options.progress(len(files), len(files))
    layer_ids = {loads.layer_ids for loads in found}
    top_k = {loads.top_k for loads in found} - {None}
    shapes = sorted({table.shape for table in tables})
    if len(shapes) != 1 or len(layer_ids) != 1 or len(top_k) > 1:
        raise InvalidTraceError(
            f"EPLB weights: wanted matrices [layers, experts] of one shape and of the "
            f"same layers and top-k, got {[list(shape) for shape in shapes][:8]}"
        )
    layers = layer_ids.pop()
    if layers is not None and len(layers) != shapes[0][0]:
        layers = None  # a list that is not of these rows
    if layers is not None and options.layers is not None and options.layers != layers:
        raise InvalidTraceError(
            f"import: `layers` is {list(options.layers)[:8]}, the file says "
            f"{list(layers)[:8]}: leave it out"
        )
    return count_trace(
        _counts(tables, _precision(found), options),
        "EPLB weights",
        options,
        None if layers is None else _increasing(layers),
        top_k.pop() if top_k else None,
    )


def read_rank_loads(files: Sequence[Path], options: ImportOptions) -> CountTrace:
    """Loads [L, G, P / G] of physical slots, by layer and rank; a file is a group."""
    tables = []
    for path in files:
        for loads in _of_file(path):
            shape = loads.table.shape
            if len(shape) != 3:
                raise InvalidTraceError(
                    f"{path}: loads by rank must be [layers, ranks, experts of a "
                    f"rank], got {list(shape)}"
                )
            check_layers(shape[0])
            table = _loads(_read(loads.table))
            tables.append(table.reshape(shape[0], -1))
    if len({table.shape for table in tables}) != 1:
        raise InvalidTraceError("loads by rank: files differ in layers or slots")
    counts = _counts(tables, np.finfo(np.float32).eps, options)
    if options.slot_experts is None:
        options.note(
            "slots are taken as experts in order (contiguous blocks, no replicas): say "
            "with `slot_experts` what the ranks held"
        )
        return count_trace(counts, "loads by rank", options)
    layers = options.layers or tuple(range(counts.shape[1]))
    if len(layers) != counts.shape[1]:
        raise InvalidTraceError(
            f"import: `layers` names {amount(len(layers), 'layer')}, there are "
            f"{counts.shape[1]}"
        )
    logical = _of_slots(counts, layers, options)
    return count_trace(logical, "loads by rank", options, np.array(layers, np.int32))


def _of_slots(
    counts_QLP: NDArray[np.int64], layers: tuple[int, ...], options: ImportOptions
) -> NDArray[np.int64]:
    """Counts of experts, from those of the slots that a placement says hold them."""
    assert options.slot_experts is not None
    num_experts = 1 + max(int(s.max()) for s in options.slot_experts.values())
    logical = np.zeros((*counts_QLP.shape[:2], num_experts), np.int64)
    for row, layer in enumerate(layers):
        slots = options.slot_experts.get(layer)
        if slots is None or len(slots) != counts_QLP.shape[2] or slots.min() < 0:
            raise InvalidTraceError(
                f"import: the placement has no {counts_QLP.shape[2]} filled slots at "
                f"layer {layer}; `layers` says which layers the rows are"
            )
        for group, counts in enumerate(counts_QLP[:, row]):
            np.add.at(logical[group, row], slots, counts)
    return logical


def _of_file(path: Path) -> list[Loads]:
    try:
        return list(tables_of(path))
    except InvalidTraceError as error:
        text = str(error)
        raise InvalidTraceError(
            text if text.startswith(str(path)) else f"{path}: {text}"
        ) from error


def _increasing(layers: tuple[int, ...]) -> NDArray[np.int32]:
    if list(layers) != sorted(set(layers)) or layers[-1] >= 1 << 16:
        raise InvalidTraceError(
            f"layers must be increasing numbers below {1 << 16}, got {list(layers)[:8]}"
        )
    return np.array(layers, np.int32)


def _tables(array: StoredArray | NDArray[Any]) -> list[NDArray[Any]]:
    """The array as matrices of loads; a long stack is folded in groups."""
    shape = array.shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise InvalidTraceError(
            f"weights must be [layers, experts] or a stack of those, got {list(shape)}"
        )
    check_layers(shape[-2])
    if len(shape) == 2:
        return [_loads(_read(array))]
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


def _read(array: StoredArray | NDArray[Any]) -> NDArray[Any]:
    return array.read() if isinstance(array, StoredArray) else array


def _loads(weights: NDArray[Any]) -> NDArray[Any]:
    """The same, whole numbers as int64 and others as float64; refuses what is no load.

    Half precision cannot hold its own sums.
    """
    if weights.dtype.kind not in "iuf":
        raise InvalidTraceError(f"weights must be numbers, got {weights.dtype}")
    if weights.dtype.kind != "f":
        return whole_counts(weights)
    if not np.isfinite(weights).all():
        raise InvalidTraceError("weights must be finite numbers")
    weights = weights.astype(np.float64)
    if weights.size and weights.min() < 0:
        raise InvalidTraceError(f"weights must be >= 0, got {weights.min()}")
    return weights


def _precision(found: list[Loads]) -> float:
    """Relative error of the loads, by the coarsest type that they were stored in."""
    kinds = [loads.table.dtype for loads in found if loads.table.dtype.kind == "f"]
    return max((float(np.finfo(kind).eps) for kind in kinds), default=0.0)


def _counts(
    tables: list[NDArray[Any]], precision: float, options: ImportOptions
) -> NDArray[np.int64]:
    loads = np.stack(tables)
    if loads.dtype.kind != "f":
        return whole_counts(loads)
    return whole_loads(loads, float(precision), options.note)
