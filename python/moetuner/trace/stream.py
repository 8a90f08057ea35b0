"""Writing a trace that is never whole in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._files import atomic_path, naming_what_is_full
from moetuner.errors import InvalidTraceError
from moetuner.trace.model import MAX_EXPERTS, TraceMetadata
from moetuner.trace.safetensors_file import header_of

if TYPE_CHECKING:
    import os
    from typing import IO

    from moetuner.trace.model import Trace

COPY_BYTES = 1 << 24
_DTYPE_NAMES = {"f4": "F32", "f2": "F16", "i4": "I32", "i2": "I16", "u1": "U8"}


class TraceWriter:
    """Appends blocks of tokens and puts the file together at the end.

    Blocks are `Trace` objects of the same layers and top-k, each validated by its own
    construction; they wait on disk, in unnamed files beside `path`. A per-token field
    survives when every block has it, and rows are ranked when those of every block are.

    Parameters
    ----------
    path
        The safetensors file to write: complete when `finish` returns, else untouched.
    num_experts
        Routed experts E; None takes the largest id that comes, plus one.

    Raises
    ------
    InvalidTraceError
        From `append`, when a block has other layers, experts or top-k than the first.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, num_experts: int | None = None
    ) -> None:
        self._path = Path(path)
        self._num_experts = num_experts
        self._largest_id = -1
        self._padded = False
        self._ranked = True
        self._first: Trace | None = None
        self._spools: dict[str, IO[bytes]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self.num_tokens = 0

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        for spool in self._spools.values():
            with suppress(OSError):  # no room for what nobody will read
                spool.close()

    @property
    def num_experts(self) -> int:
        """Routed experts, as told or as seen so far."""
        return self._num_experts or max(self._largest_id + 1, 1)

    @property
    def metadata(self) -> TraceMetadata:
        """Of the first block."""
        return TraceMetadata() if self._first is None else self._first.metadata

    @property
    def num_layers(self) -> int:
        """Layers of the blocks; 0 before the first."""
        return 0 if self._first is None else self._first.num_layers

    def append(self, block: Trace) -> None:
        """Add the tokens of `block`; an empty one adds nothing."""
        if not block.num_tokens:
            return
        arrays = block.arrays()
        if self._first is None:
            self._first = block
            for name in arrays.keys() - {"layer_ids"}:
                self._spools[name] = tempfile.TemporaryFile(  # noqa: SIM115
                    dir=self._path.absolute().parent
                )
                self._dtypes[name] = arrays[name].dtype
        self._check(block)
        self._largest_id = max(self._largest_id, int(block.topk_ids.max()))
        self._padded |= bool(block.topk_ids.min() < 0)
        self._ranked &= block.ranked
        for name in set(self._spools) - set(arrays):
            self.forget(name)
        with naming_what_is_full(self._path):
            for name, spool in self._spools.items():
                array = arrays[name].astype(self._dtypes[name], copy=False)
                spool.write(np.ascontiguousarray(array).tobytes())
        self.num_tokens += block.num_tokens

    def forget(self, name: str) -> None:
        """Leave the field `name` out of the file."""
        if name in self._spools:
            self._spools.pop(name).close()

    def finish(self, metadata: TraceMetadata | None = None) -> None:
        """Write the file, with the metadata of the first block unless other is given.

        Raises
        ------
        InvalidTraceError
            When no token was appended.
        """
        if self._first is None:
            raise InvalidTraceError("the recording holds no token")
        narrow = self.num_experts <= 256 and not self._padded
        stored = dict(self._dtypes) | {"layer_ids": np.dtype(np.int32)}
        if narrow:
            stored["topk_ids"] = np.dtype(np.uint8)
        names = [n for n in stored if n in self._spools or n == "layer_ids"]
        names.sort(key=lambda name: (-stored[name].itemsize, name))
        shapes = {name: self._shape(name) for name in names}
        with atomic_path(self._path) as temporary, temporary.open("wb") as file:
            file.write(self._header(names, shapes, stored, metadata or self.metadata))
            for name in names:
                self._copy(name, file, narrow=narrow and name == "topk_ids")

    def _check(self, block: Trace) -> None:
        first = self._first
        assert first is not None
        same = block.top_k == first.top_k and np.array_equal(
            block.layer_ids, first.layer_ids
        )
        if not same:
            raise InvalidTraceError(
                f"the recording changes shape: first top-{first.top_k} at layers "
                f"{first.layer_ids.tolist()}, then top-{block.top_k} at "
                f"{block.layer_ids.tolist()}"
            )
        if self._num_experts and block.topk_ids.max() >= self._num_experts:
            raise InvalidTraceError(
                f"expert id {block.topk_ids.max()} is outside "
                f"0..{self._num_experts - 1}"
            )

    def _shape(self, name: str) -> list[int]:
        assert self._first is not None
        if name == "layer_ids":
            return [self._first.num_layers]
        inner = self._first.arrays()[name].shape[1:]
        return [self.num_tokens, *inner]

    def _header(
        self,
        names: list[str],
        shapes: dict[str, list[int]],
        stored: dict[str, np.dtype[Any]],
        metadata: TraceMetadata,
    ) -> bytes:
        header: dict[str, Any] = {
            "__metadata__": header_of(
                metadata,
                num_experts=str(min(self.num_experts, MAX_EXPERTS)),
                ranked="true" if self._ranked else "false",
            )
        }
        end = 0
        for name in names:
            start, end = end, end + stored[name].itemsize * int(np.prod(shapes[name]))
            header[name] = {
                "dtype": _DTYPE_NAMES[stored[name].str[1:]],
                "shape": shapes[name],
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _copy(self, name: str, file: IO[bytes], *, narrow: bool) -> None:
        if name == "layer_ids":
            assert self._first is not None
            file.write(self._first.layer_ids.astype("<i4").tobytes())
            return
        spool = self._spools[name]
        spool.seek(0)
        if not narrow:
            shutil.copyfileobj(spool, file, COPY_BYTES)
            return
        while data := spool.read(COPY_BYTES):
            file.write(np.frombuffer(data, np.int16).astype(np.uint8).tobytes())
