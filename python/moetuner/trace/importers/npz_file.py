"""NumPy archives with ``experts`` [tokens, layers, top-k], or with counts.

`moetuner.trace.npz` reads them whole; here ids and weights come block by block.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import Tokens, block_rows
from moetuner.trace.npz import (
    check_members,
    load_member,
    per_token_trace,
    read_header,
    read_npz,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import IO

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.model import CountTrace, Trace

_STREAMED = ("experts", "weights")
_PER_TOKEN = {"seq", "pos"}


class _Stream(NamedTuple):
    """An array of which the rows are read in turn."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: IO[bytes]

    def rows(self, count: int) -> NDArray[Any]:
        """The next `count` rows."""
        inner = int(np.prod(self.shape[1:]))
        data = self.file.read(count * inner * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])


def read_npz_recording(
    files: Sequence[Path], options: ImportOptions
) -> Tokens | CountTrace:
    """One archive of tokens or counts."""
    if len(files) != 1:
        raise InvalidTraceError(f"npz: wanted one archive, got {len(files)}")
    path = files[0]
    try:
        with zipfile.ZipFile(path) as archive:
            has_tokens = "experts.npy" in archive.namelist()
    except Exception as error:  # zipfile trips over damage in a dozen ways
        raise InvalidTraceError(f"{path}: damaged archive: {error}") from error
    if not has_tokens:
        counted = read_npz(path)
        assert not hasattr(counted, "topk_ids")
        if options.num_experts not in (None, counted.num_experts):
            raise InvalidTraceError(
                f"import: num_experts is {options.num_experts}, the counts are of "
                f"{counted.num_experts}"
            )
        return counted
    return Tokens(
        blocks=_checked(path, options),
        num_experts=options.num_experts,
        source="NumPy archive",
    )


def _checked(path: Path, options: ImportOptions) -> Iterator[Trace]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check_members(members, path.stat().st_size)
            yield from _blocks(path, archive, members, options)
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error
    except Exception as error:  # zipfile and NumPy trip over damage in a dozen ways
        raise InvalidTraceError(
            f"{path}: damaged archive: {type(error).__name__}: {error}"
        ) from error


def _blocks(
    path: Path,
    archive: zipfile.ZipFile,
    members: list[zipfile.ZipInfo],
    options: ImportOptions,
) -> Iterator[Trace]:
    small, streams = {}, {}
    for member in members:
        name = member.filename[:-4]
        if name not in _STREAMED:
            small[name] = load_member(archive, member)
            continue
        file = archive.open(member)
        shape, fortran, dtype = read_header(name, file, member.file_size)
        if fortran or len(shape) != 3:
            raise InvalidTraceError(
                f"{name} must be [tokens, layers, top_k] in C order, got {list(shape)}"
            )
        streams[name] = _Stream(shape, dtype, file)
    num_tokens, num_layers, top_k = streams["experts"].shape
    lengths = {name: stream.shape[0] for name, stream in streams.items()}
    lengths |= {
        n: len(small[n]) if small[n].ndim else 0 for n in _PER_TOKEN & small.keys()
    }
    if set(lengths.values()) != {num_tokens}:
        raise InvalidTraceError(f"arrays differ in their number of tokens: {lengths}")
    rows = block_rows(num_layers, top_k)
    for start in range(0, num_tokens, rows):
        stop = min(start + rows, num_tokens)
        arrays = dict(small)
        for name in _PER_TOKEN & small.keys():
            arrays[name] = small[name][start:stop]
        for name, stream in streams.items():
            arrays[name] = stream.rows(stop - start)
        yield per_token_trace(arrays, path)
        options.progress(stop, num_tokens)
