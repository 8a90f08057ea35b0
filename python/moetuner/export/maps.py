"""Slot maps that are arrays: ``.npy``, and tensors of ``torch.save``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.export.base import MAX_EXPERTS, MAX_VALUES
from moetuner.trace.importers.stored import StoredArray, open_npy
from moetuner.trace.importers.torch_file import read_torch_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def read_npy(path: Path) -> NDArray[Any]:
    """The array of an ``.npy`` file of bounded size.

    Raises
    ------
    InvalidPlacementError
        When it is damaged or too large.
    """
    try:
        return _read(open_npy(path), path)
    except InvalidTraceError as error:
        raise InvalidPlacementError(str(error)) from error


def read_torch(path: Path) -> Any:
    """What a file of ``torch.save`` holds, with arrays for its tensors.

    Raises
    ------
    InvalidPlacementError
        When it is damaged or too large.
    MissingDependencyError
        When torch is not installed.
    """
    try:
        content = read_torch_file(path)
        if isinstance(content, StoredArray):
            return _read(content, path)
        if isinstance(content, dict):
            return {
                name: _read(value, path) if isinstance(value, StoredArray) else value
                for name, value in content.items()
            }
    except InvalidTraceError as error:
        raise InvalidPlacementError(str(error)) from error
    return content


def map_of(array: NDArray[Any], what: str) -> NDArray[np.int64]:
    """Expert of each slot, int64 [layers, P]; a single row stays one.

    Raises
    ------
    InvalidPlacementError
        When the array is no such map.
    """
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise InvalidPlacementError(
            f"{what} must be integers [layers, slots], got {array.dtype} "
            f"{list(array.shape)}"
        )
    if array.min() < 0 or array.max() >= MAX_EXPERTS:
        raise InvalidPlacementError(
            f"{what}: expert ids must be 0..{MAX_EXPERTS - 1}, got "
            f"{array.min()}..{array.max()}"
        )
    return np.atleast_2d(array.astype(np.int64))


def _read(array: StoredArray, path: Path) -> NDArray[Any]:
    if np.prod(array.shape, dtype=float) > MAX_VALUES:
        raise InvalidPlacementError(f"{path}: more than {MAX_VALUES} values")
    return array.read()
