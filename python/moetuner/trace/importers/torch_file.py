"""Files of ``torch.save``: the one module left of the ops that imports torch.

torch is optional and imported when such a file is met; only plain data is unpickled
(``weights_only=True``), and tensors come back as arrays that stay in their file.
"""

from __future__ import annotations

import re
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError, MissingDependencyError
from moetuner.trace.importers.stored import StoredArray

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

# The pickle beside the tensors: 1-3 % of a recording of prompts, more where passes
# decode few tokens. A hostile one unpacks to some sixty bytes of objects per byte, so
# to at most sixteen times the file.
FREE_PICKLE_BYTES = 1 << 23
MAX_PICKLE_SHARE = 0.25
_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def read_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote, with a `StoredArray` for each tensor.

    Raises
    ------
    MissingDependencyError
        When torch is not installed.
    InvalidTraceError
        When the file is damaged, compressed, or would run code.
    """
    places = _check_archive(path)
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: a file of torch.save is read with torch: "
            f"pip install 'moetuner[torch]'"
        ) from error
    try:
        # Documented in "Serialization semantics": under this mode no tensor is read,
        # and each storage says where in the file it lies.
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _Walk(path, places, torch).replaced(content)
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error
    except Exception as error:  # the unpickler meets damage in a dozen ways
        reason = str(error).partition("\n")[0]
        raise InvalidTraceError(
            f"{path}: not plain data of torch.save: {type(error).__name__}: "
            f"{reason:.200}"
        ) from error


def is_torch_file(path: Path) -> bool:
    """Whether it is a zip archive as ``torch.save`` makes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _pickle_of(archive) is not None
    except Exception:  # no archive that zipfile can read
        return False


def pickle_start(path: Path, num_bytes: int = 4096) -> bytes:
    """The first bytes of the pickle, in which the names of its keys can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = _pickle_of(archive)
            assert member is not None
            with archive.open(member) as stream:
                return stream.read(num_bytes)
    except Exception as error:  # zipfile meets damage in a dozen ways
        raise InvalidTraceError(f"{path}: damaged archive: {error}") from error


def _pickle_of(archive: zipfile.ZipFile) -> zipfile.ZipInfo | None:
    for member in archive.infolist():
        if member.filename.endswith("/data.pkl"):
            return member
    return None


def _check_archive(path: Path) -> dict[int, int]:
    """Refuse what torch.save does not make; bytes at each offset of a member."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members, pickled = archive.infolist(), _pickle_of(archive)
            places = {_data_offset(file, m): m.file_size for m in members}
            alignments = [
                archive.read(m)
                for m in members
                if m.filename.endswith("/.storage_alignment")
            ]
    except Exception as error:  # zipfile meets damage in a dozen ways
        raise InvalidTraceError(
            f"{path}: wanted a zip archive of torch.save; older and damaged files are "
            f"not read: {error}"
        ) from error
    size = path.stat().st_size
    # torch divides by it, and 0 ends the process.
    if any(not re.fullmatch(rb"[1-9]\d{0,5}", text) for text in alignments):
        raise InvalidTraceError(f"{path}: damaged: no alignment of tensors")
    if pickled is None:
        raise InvalidTraceError(f"{path}: no archive of torch.save: no data.pkl in it")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InvalidTraceError(f"{path}: compressed members; torch.save makes none")
    if sum(member.file_size for member in members) > size:
        raise InvalidTraceError(f"{path}: claims more than its {size} bytes")
    if pickled.file_size > FREE_PICKLE_BYTES + MAX_PICKLE_SHARE * size:
        raise InvalidTraceError(
            f"{path}: {pickled.file_size} of {size} bytes are pickled objects: refused"
        )
    return places


def _data_offset(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after its local header."""
    file.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return int(member.header_offset + 30 + name + extra)


class _Walk:
    """Content with its tensors replaced; lists, dicts and numbers stay as they are."""

    def __init__(self, path: Path, places: dict[int, int], torch: Any) -> None:
        self._path, self._places, self._torch = path, places, torch
        # A list that is in many places is walked once: thirty lists, each twice in the
        # next, are a billion otherwise.
        self._done: dict[int, Any] = {}

    def replaced(self, content: Any) -> Any:
        """The same, with a `StoredArray` for each tensor."""
        known = self._done.get(id(content))
        if known is not None:
            return known
        if isinstance(content, self._torch.Tensor):
            result: Any = _stored(content, self._path, self._places)
        elif isinstance(content, dict):
            result = {key: self.replaced(value) for key, value in content.items()}
        # A list of tokens has no tensor in it: looking at its head is enough.
        elif isinstance(content, list | tuple) and not all(
            isinstance(value, int | float | str) for value in content[:1]
        ):
            result = [self.replaced(value) for value in content]
        else:
            return content
        self._done[id(content)] = result
        return result


def _stored(tensor: Any, path: Path, places: dict[int, int]) -> StoredArray:
    name = str(tensor.dtype).removeprefix("torch.")
    layout = str(tensor.layout).removeprefix("torch.")
    if layout != "strided":
        raise InvalidTraceError(
            f"a tensor with the layout {layout} is not read: save it dense (to_dense)"
        )
    if name not in _DTYPES:
        raise InvalidTraceError(
            f"a tensor of {name} is not read: save it as one of {', '.join(_DTYPES)}"
        )
    offset = tensor.untyped_storage()._checkpoint_offset
    # torch works offsets out from the sizes before them, which holds for its own files.
    if tensor.untyped_storage().nbytes() > places.get(offset, -1):
        raise InvalidTraceError(
            "a tensor does not lie where torch.save puts it: cut short, or packed anew"
        )
    kind = np.dtype(name)
    return StoredArray(
        path=path,
        offset=offset + tensor.storage_offset() * kind.itemsize,
        shape=tuple(tensor.shape),
        dtype=kind,
        strides=tuple(tensor.stride()),
    )
