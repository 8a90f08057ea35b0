"""Counts of passes and steps, folded into groups and named by layer.

Legend: L rows of layers, E experts, Q groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.counts import counted
from moetuner.trace.importers.base import MAX_GROUPS, MAX_TABLE_BYTES, named
from moetuner.trace.importers.layers import name_rows
from moetuner.trace.model import TraceMetadata
from moetuner.trace.shapes import check_layers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.importers.stored import StoredArray
    from moetuner.trace.model import CountTrace


def fold_counts(
    passes: Iterable[NDArray[np.int64]],
    total: int,
    source: str,
    options: ImportOptions,
) -> CountTrace:
    """Add the counts [L_all, E] of `total` passes up in at most `MAX_GROUPS` groups.

    Passes and layers without a count are left out; groups keep the order of time.

    Raises
    ------
    InvalidTraceError
        When nothing was counted, or the tables would fill the memory.
    """
    groups: NDArray[np.int64] | None = None
    for index, counts in enumerate(passes):
        if groups is None:
            num_groups = min(total, MAX_GROUPS)
            if 8 * num_groups * counts.size > MAX_TABLE_BYTES:
                raise InvalidTraceError(
                    f"counts of {list(counts.shape)} are too large a table"
                )
            groups = np.zeros((num_groups, *counts.shape), np.int64)
        if counts.size and counts.min() < 0:
            raise InvalidTraceError(f"counts must be >= 0, got {counts.min()}")
        if counts.shape != groups.shape[1:]:
            raise InvalidTraceError(
                f"counts change shape from {list(groups.shape[1:])} to "
                f"{list(counts.shape)}"
            )
        groups[index * len(groups) // max(total, 1)] += counts
    if groups is None or not groups.any():
        raise InvalidTraceError("the recording counted nothing")
    return count_trace(groups, source, options)


def count_trace(
    counts_QLE: NDArray[np.int64],
    source: str,
    options: ImportOptions,
    layer_ids: NDArray[np.int32] | None = None,
    top_k: int | None = None,
) -> CountTrace:
    """Counts per group, layer and expert as a trace, under the names of the options.

    Raises
    ------
    InvalidTraceError
        When the options contradict the counts, or these are of no model.
    """
    check_layers(counts_QLE.shape[1])
    if not counts_QLE.any():
        raise InvalidTraceError("the recording counted nothing")
    if layer_ids is None:
        layers = name_rows(
            np.asarray(counts_QLE.any(axis=(0, 2))), options.layers, options.note
        )
        counts_QLE, layer_ids = counts_QLE[:, layers.rows], layers.layer_ids
    if options.num_experts not in (None, counts_QLE.shape[2]):
        raise InvalidTraceError(
            f"import: `num_experts` is {options.num_experts}, the counts are of "
            f"{counts_QLE.shape[2]}"
        )
    if None not in (top_k, options.top_k) and top_k != options.top_k:
        raise InvalidTraceError(
            f"import: `top_k` is {options.top_k}, the recording says {top_k}"
        )
    return counted(
        counts_QLE,
        layer_ids=layer_ids,
        top_k=top_k or options.top_k,
        metadata=named(TraceMetadata(), options, source),
    )


def counts_of(array: StoredArray, start: int = 0, stop: int | None = None) -> Any:
    """Part of a stored array as int64 counts; refuses what is no count."""
    return whole_counts(array.read(start, stop))


def whole_counts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Numbers as int64 counts; refuses fractions, NaN and what is below 0."""
    if values.dtype.kind not in "iuf":
        raise InvalidTraceError(f"counts must be numbers, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidTraceError("counts must be finite numbers")
    if values.size and (values.min() < 0 or values.max() > 2**53):
        raise InvalidTraceError(
            f"counts must be 0..2**53, got {values.min()}..{values.max()}"
        )
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        raise InvalidTraceError("counts must be whole numbers")
    return values.astype(np.int64)
