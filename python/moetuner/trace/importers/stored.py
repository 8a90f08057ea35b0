"""Arrays that stay in their file until a part of them is read.

Nothing is believed: a shape that the file is too small for is refused before a byte
of it is allocated, so reading takes no more memory than the file has bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.npz import read_header

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

    from numpy.typing import NDArray

_MAX_HEADER = 100_000_000  # what safetensors itself allows
_MAX_RANK = 8
_SAFETENSORS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "u2",
    "I16": "i2",
    "F16": "f2",
    "U32": "u4",
    "I32": "i4",
    "F32": "f4",
    "U64": "u8",
    "I64": "i8",
    "F64": "f8",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredArray:
    """An array in a file.

    Parameters
    ----------
    path, offset
        The file, and the byte where element 0 lies.
    shape, dtype
        Of the array; no Python objects.
    strides
        In elements; None for C order.

    Raises
    ------
    InvalidTraceError
        When the file ends before the array does, or the array is larger than the file.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        steps = _c_strides(self.shape) if self.strides is None else self.strides
        legal = (
            len(self.shape) == len(steps) <= _MAX_RANK
            and self.offset >= 0
            and not self.dtype.hasobject
            and all(length >= 0 for length in self.shape)
            and all(step >= 0 for step in steps)
        )
        if not legal:
            raise InvalidTraceError(
                f"an array of shape {list(self.shape)[:_MAX_RANK]} and {self.dtype} "
                f"makes no sense"
            )
        size = math.prod(self.shape)
        last = sum(step * (n - 1) for n, step in zip(self.shape, steps, strict=True))
        room = self.path.stat().st_size - self.offset
        if size and max(size, last + 1) * self.dtype.itemsize > room:
            raise InvalidTraceError(
                f"an array claims the shape {list(self.shape)} of {self.dtype}, the "
                f"file has {max(room, 0)} bytes for it"
            )

    @property
    def num_bytes(self) -> int:
        """Size of the array, whatever part of the file that is."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self, start: int = 0, stop: int | None = None, *, axis: int = 0
    ) -> NDArray[Any]:
        """A copy of the part `start`..`stop` along `axis`, C-contiguous."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        steps = _c_strides(self.shape) if self.strides is None else self.strides
        span = 1 + sum(s * (n - 1) for n, s in zip(self.shape, steps, strict=True))
        # The mapping goes with this function, and its pages with it.
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, (span,))
        whole = np.lib.stride_tricks.as_strided(
            np.asarray(mapped),
            self.shape,
            [step * self.dtype.itemsize for step in steps],
            writeable=False,
        )
        part = [slice(None)] * len(self.shape)
        if part:
            part[axis] = slice(start, stop)
        return np.array(whole[tuple(part)], order="C")


def open_npy(path: Path) -> StoredArray:
    """The array of an ``.npy`` file; nothing is unpickled.

    Raises
    ------
    InvalidTraceError
        When the header is damaged, or holds Python objects.
    """
    with path.open("rb") as file:
        shape, fortran, dtype = npy_header(path.name, file, path.stat().st_size)
        if dtype.kind not in "iufb":
            raise InvalidTraceError(f"{path}: wanted numbers, got {dtype}")
        strides = tuple(reversed(_c_strides(shape[::-1]))) if fortran else None
        return StoredArray(
            path=path, offset=file.tell(), shape=shape, dtype=dtype, strides=strides
        )


def npy_header(
    name: str, stream: IO[bytes], num_bytes: int
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of a whole ``.npy`` of `num_bytes`."""
    try:
        return read_header(name, stream, num_bytes)
    except InvalidTraceError:
        raise
    except Exception as error:  # its parser trips over damage in a dozen ways
        raise InvalidTraceError(
            f"{name}: damaged .npy header: {type(error).__name__}: {error}"
        ) from error


def open_safetensors(path: Path) -> dict[str, StoredArray]:
    """The tensors of a safetensors file by name; bfloat16 and FP8 ones left out.

    Raises
    ------
    InvalidTraceError
        When the header is damaged or claims more than the file has.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        room = path.stat().st_size - 8
        if not 2 <= size <= min(room, _MAX_HEADER):
            raise InvalidTraceError(f"{path}: truncated, or not a safetensors file")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError) as error:
            raise InvalidTraceError(
                f"{path}: damaged safetensors header: {error}"
            ) from error
    if not isinstance(header, dict):
        raise InvalidTraceError(f"{path}: damaged safetensors header")
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        try:
            dtype = _SAFETENSORS.get(entry["dtype"])
            shape = tuple(_natural(length) for length in entry["shape"])
            start, stop = (_natural(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidTraceError(
                f"{path}: damaged safetensors entry {name!r:.40}: {error}"
            ) from error
        if dtype is None:
            continue
        kind = np.dtype(dtype)
        if math.prod(shape) * kind.itemsize != stop - start:
            raise InvalidTraceError(
                f"{path}: tensor {name!r:.40} of shape {list(shape)} and {kind} has "
                f"{stop - start} bytes"
            )
        arrays[name] = StoredArray(
            path=path, offset=8 + size + start, shape=shape, dtype=kind
        )
    return arrays


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"wanted a whole number >= 0, got {value!r:.40}")
    return value


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
