"""EPLB's three tensors: ``phy2log`` [L, P], ``log2phy`` [L, E, X], ``logcnt`` [L, E].

What ``rebalance_experts`` of github.com/deepseek-ai/EPLB returns, as safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.export.base import MAX_VALUES, ExportOptions, SlotMap, Written
from moetuner.export.maps import map_of, read_npy
from moetuner.export.rows import complete, filled_rows
from moetuner.trace.importers.stored import open_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement

_NAMES = ("phy2log", "log2phy", "logcnt")


def write_eplb(placement: Placement, options: ExportOptions) -> Written:
    """The three tensors."""
    completed = complete(placement, options, "eplb")
    slots = filled_rows(completed, options).astype(np.int64)
    logcnt = np.stack(
        [np.bincount(row, minlength=placement.num_experts) for row in slots]
    )
    tensors = {
        "phy2log": slots,
        "log2phy": _slots_of_experts(slots, logcnt),
        "logcnt": logcnt.astype(np.int64),
    }
    return Written(
        data=save(tensors),
        command=(
            "from safetensors.torch import load_file; phy2log, log2phy, logcnt = "
            'map(load_file("{string}").get, ("phy2log", "log2phy", "logcnt"))'
        ),
        notes=(
            *completed.notes,
            "rows are the MoE layers in order; -1 in log2phy is no slot",
        ),
    )


def read_eplb(path: Path) -> SlotMap:
    """The slot map of ``phy2log``; the other two must agree with it.

    From safetensors, or ``phy2log`` alone as ``.npy``.
    """
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            array = read_npy(path)
            return SlotMap(
                slots=map_of(array, f"{path}: the map"), shared=array.ndim < 2
            )
    try:
        arrays = open_safetensors(path)
        if not set(arrays) <= set(_NAMES) or "phy2log" not in arrays:
            raise InvalidPlacementError(
                f"{path}: wanted the tensors {', '.join(_NAMES)}, got "
                f"{sorted(arrays)[:8]!r:.80}"
            )
        if any(np.prod(a.shape, dtype=float) > MAX_VALUES for a in arrays.values()):
            raise InvalidPlacementError(f"{path}: more than {MAX_VALUES} values")
        tensors = {name: array.read() for name, array in arrays.items()}
    except InvalidTraceError as error:
        raise InvalidPlacementError(str(error)) from error
    if tensors["phy2log"].ndim != 2:
        raise InvalidPlacementError(
            f"{path}: phy2log must be integers [layers, slots], got "
            f"{list(tensors['phy2log'].shape)}"
        )
    slots = map_of(tensors["phy2log"], f"{path}: phy2log")
    counts = np.stack([np.bincount(row, minlength=slots.max() + 1) for row in slots])
    logcnt = tensors.get("logcnt")
    if logcnt is not None and not np.array_equal(logcnt, counts):
        raise InvalidPlacementError(f"{path}: logcnt does not count phy2log")
    return SlotMap(slots=slots)


def _slots_of_experts(
    slots: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Slots of each expert in rising order, padded with -1."""
    table = np.full((*counts.shape, int(counts.max())), -1, np.int64)
    for layer, row in enumerate(slots):
        order = np.argsort(row, kind="stable")
        starts = np.cumsum(counts[layer]) - counts[layer]
        place = np.arange(len(row)) - starts[row[order]]
        table[layer, row[order], place] = order
    return table
