"""A tensor as ``torch.save`` writes it, without torch.

A stored zip archive: ``data.pkl`` with one ``_rebuild_tensor_v2``, and the bytes. Read
by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ALIGNMENT = 64  # of a member's bytes, as torch aligns them


def torch_bytes(table: NDArray[np.int64]) -> bytes:
    """The file of one int64 tensor of any shape."""
    values = np.ascontiguousarray(table, "<i8")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (
            ("data.pkl", _pickle(values)),
            ("byteorder", b"little"),
            ("data/0", values.tobytes()),
            ("version", b"3\n"),
        ):
            member = _aligned(stream, f"archive/{name}")
            archive.writestr(member, content)
    return stream.getvalue()


def _aligned(stream: io.BytesIO, name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    start = stream.tell() + 30 + len(name) + 4
    padding = -start % _ALIGNMENT
    member.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return member


def _pickle(values: NDArray[np.int64]) -> bytes:
    """``_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())``."""
    strides = tuple(stride // values.itemsize for stride in values.strides)
    storage = _text("storage") + _name("torch", "LongStorage")
    storage += _text("0") + _text("cpu") + _number(values.size)
    return b"".join(
        (
            b"\x80\x02",
            _name("torch._utils", "_rebuild_tensor_v2"),
            pickle.MARK,
            pickle.MARK + storage + pickle.TUPLE + pickle.BINPERSID,
            _number(0),
            pickle.MARK + b"".join(map(_number, values.shape)) + pickle.TUPLE,
            pickle.MARK + b"".join(map(_number, strides)) + pickle.TUPLE,
            pickle.NEWFALSE,
            _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
            pickle.TUPLE + pickle.REDUCE + pickle.STOP,
        )
    )


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)
