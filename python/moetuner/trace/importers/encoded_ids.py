"""Routed experts as servers put them into JSON, decoded.

========================================  ===========================================
``"..."``, base64 of an ``.npy`` file      vLLM: [tokens, layers, top-k]
``"..."``, base64 of int32                 SGLang: flat, cut by the options
``[[[...], ...], ...]``                    vLLM: nested lists of the same shape
``{"data", "shape", "dtype", "start"}``    raw bytes or lists; `start` is the position
                                           of the first row in the sequence
========================================  ===========================================
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import as_ids
from moetuner.trace.importers.stored import npy_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions

_NPY = b"\x93NUMPY"
_DTYPES = {
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Routed experts of one piece of a sequence.

    Parameters
    ----------
    ids
        int16 [t, layers, top-k].
    start
        Position of the first row in its sequence; None where nobody says.
    """

    ids: NDArray[np.int16]
    start: int | None = None


def decode_rows(value: Any, options: ImportOptions) -> Rows:
    """Ids in any of the forms above.

    Raises
    ------
    InvalidTraceError
        When it is none of them, or claims another size than it has.
    """
    if isinstance(value, str):
        return Rows(ids=_checked(_of_text(value, options), options))
    if isinstance(value, list):
        return Rows(ids=_checked(_of_lists(value), options))
    if not isinstance(value, dict):
        raise InvalidTraceError(
            f"routed_experts must be base64 text, lists, or an object with data and "
            f"shape, got {type(value).__name__}"
        )
    start = value.get("start")
    if start is not None and not _is_natural(start):
        raise InvalidTraceError(
            f"routed_experts: start must be a position, got {start!r:.40}"
        )
    return Rows(ids=_checked(_of_object(value, options), options), start=start)


def _checked(ids: NDArray[Any], options: ImportOptions) -> NDArray[np.int16]:
    """The ids, unless options contradict what each token has."""
    if len(ids) and options.top_k not in (None, ids.shape[2]):
        raise InvalidTraceError(
            f"`top_k` is {options.top_k}, the recording has "
            f"{amount(ids.shape[2], 'expert')} per token"
        )
    if options.num_layers is not None and options.num_layers < ids.shape[1]:
        raise InvalidTraceError(
            f"`num_layers` is {options.num_layers}, the recording has "
            f"{amount(ids.shape[1], 'layer')}"
        )
    return as_ids(ids)


def _of_text(text: str, options: ImportOptions) -> NDArray[Any]:
    data = _bytes_of(text)
    if not data.startswith(_NPY):
        return _flat(data, options)
    stream = io.BytesIO(data)
    shape, fortran, dtype = npy_header("routed_experts", stream, len(data))
    if dtype.kind not in "iu" or len(shape) != 3 or not math.prod(shape[1:]):
        raise InvalidTraceError(
            f"routed_experts must be integers [tokens, layers, top-k], got {dtype} "
            f"{list(shape)[:8]}"
        )
    ids = np.frombuffer(data, dtype, offset=stream.tell())
    return ids.reshape(shape, order="F" if fortran else "C")


def _of_lists(value: list[Any]) -> NDArray[Any]:
    if not value:
        return np.empty((0, 1, 1), np.int16)
    try:
        ids = np.array(value)
    except (ValueError, OverflowError) as error:
        raise InvalidTraceError(
            "routed_experts: rows differ in length, or a number needs more than 64 bits"
        ) from error
    if ids.ndim != 3 or not ids.size or ids.dtype.kind not in "iu":
        raise InvalidTraceError(
            f"routed_experts must be lists of whole numbers [tokens][layers][top-k], "
            f"got {ids.dtype} {list(ids.shape)[:8]}"
        )
    return ids


def _of_object(value: dict[str, Any], options: ImportOptions) -> NDArray[Any]:
    shape, data = value.get("shape"), value.get("data")
    if isinstance(data, list) and shape is None:
        return _of_lists(data)
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(_is_natural(n) for n in shape)
        or not math.prod(shape[1:])
    ):
        raise InvalidTraceError(
            f"routed_experts: shape must be [tokens, layers, top-k], got {shape!r:.60}"
        )
    size = math.prod(shape)
    if isinstance(data, list):
        try:
            flat = np.array(data).ravel()
        except (ValueError, OverflowError) as error:
            raise InvalidTraceError(f"routed_experts: data: {error}") from error
    elif isinstance(data, str):
        raw = _bytes_of(data)
        if raw.startswith(_NPY):
            flat = _of_text(data, options).ravel()
        else:
            flat = np.frombuffer(raw, _dtype_of(value.get("dtype"), len(raw), size))
    else:
        raise InvalidTraceError(
            f"routed_experts: data must be base64 text, got {type(data).__name__}"
        )
    if flat.size != size:
        raise InvalidTraceError(
            f"routed_experts: data holds {flat.size} numbers, shape {shape} wants "
            f"{size}"
        )
    ids: NDArray[Any] = flat.reshape(shape)
    return ids


def _dtype_of(name: Any, num_bytes: int, size: int) -> np.dtype[Any]:
    """The named type, or the unsigned one that the number of bytes leaves."""
    if name is None:
        if not size or num_bytes not in (size, 2 * size, 4 * size, 8 * size):
            raise InvalidTraceError(
                f"routed_experts: data holds {num_bytes} bytes, shape wants {size} "
                f"numbers, and no dtype says of which size"
            )
        # Smaller than any id's sign bit: signed and unsigned read alike.
        return np.dtype(f"<u{num_bytes // size}")
    short = str(name).rpartition(".")[2]
    if short not in _DTYPES and str(name) not in _DTYPES.values():
        raise InvalidTraceError(f"routed_experts: dtype {name!r:.40} holds no ids")
    dtype = np.dtype(_DTYPES.get(short, short))
    if num_bytes % dtype.itemsize:
        raise InvalidTraceError(f"routed_experts: {num_bytes} bytes are no {dtype}")
    return dtype


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidTraceError(f"routed_experts is not base64: {error}") from error


def _flat(data: bytes, options: ImportOptions) -> NDArray[np.int32]:
    if options.num_layers is None or options.top_k is None:
        raise InvalidTraceError(
            f"routed_experts is a flat list of {len(data) // 4} int32, as SGLang "
            f"returns it: say with `num_layers` (all hidden layers) and `top_k` how to "
            f"cut it"
        )
    width = options.num_layers * options.top_k
    if len(data) % (4 * width):
        raise InvalidTraceError(
            f"{len(data)} bytes of int32 are no whole rows of {options.num_layers} "
            f"layers x top-{options.top_k}"
        )
    shape = (-1, options.num_layers, options.top_k)
    return np.frombuffer(data, "<i4").reshape(shape)


def _is_natural(value: Any) -> bool:
    return (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40
    )
