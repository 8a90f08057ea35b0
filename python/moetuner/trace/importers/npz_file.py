"""NumPy archives with ``experts`` [tokens, layers, top-k], or with counts.

`moetuner.trace.npz` reads them whole; here ids and weights come block by block.
"""

from __future__ import annotations

import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.counts import counts_with_top_k
from moetuner.trace.importers.base import Tokens, block_rows
from moetuner.trace.importers.rows import TokenRows
from moetuner.trace.model import Trace
from moetuner.trace.npz import (
    check_members,
    load_member,
    metadata_of,
    per_token_trace,
    read_header,
    read_npz,
    recorded_experts,
)
from moetuner.trace.split import select

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import IO

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.model import CountTrace

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
        assert not isinstance(counted, Trace)
        if options.num_experts not in (None, counted.num_experts):
            raise InvalidTraceError(
                f"import: `num_experts` is {options.num_experts}, the counts are of "
                f"{counted.num_experts}"
            )
        return _counts(counted, options)
    recorded = _recorded_experts(path)
    if None not in (options.num_experts, recorded) and recorded != options.num_experts:
        raise InvalidTraceError(
            f"import: `num_experts` is {options.num_experts}, the archive says "
            f"{recorded}"
        )
    return Tokens(
        blocks=_checked(path, options),
        num_experts=recorded or options.num_experts,
        source="NumPy archive",
    )


def _counts(counted: CountTrace, options: ImportOptions) -> CountTrace:
    """The counts with the top-k and the layer numbers of the options."""
    given = options.layers
    if given is not None and given != tuple(counted.layer_ids.tolist()):
        if len(given) != counted.num_layers:
            raise InvalidTraceError(
                f"import: `layers` names {amount(len(given), 'layer')}, the archive "
                f"has {counted.num_layers} that route: {counted.layer_ids.tolist()[:8]}"
            )
        counted = replace(counted, layer_ids=np.array(given, np.int32))
    if options.top_k is None:
        return counted
    return counts_with_top_k(counted, options.top_k)


def _given_layers(
    recorded: NDArray[np.integer[Any]], options: ImportOptions
) -> NDArray[np.int32]:
    """The numbers of the options, which those of the archive must not contradict."""
    numbers = tuple(recorded.ravel().tolist())
    if options.layers != numbers:
        raise InvalidTraceError(
            f"import: `layers` is {list(options.layers or ())[:8]}, the archive says "
            f"{list(numbers)[:8]}: leave it out"
        )
    return np.array(numbers, np.int32)


def _named(block: Trace, token_rows: TokenRows, recorded: bool) -> Trace:
    """The routed tokens of a block, at the layers that have experts."""
    if recorded:
        mask = np.asarray((block.topk_ids >= 0).any(axis=(1, 2)))
        return block if mask.all() else select(block, mask)
    places, ids = token_rows.routed(block.topk_ids)
    mask = np.zeros(block.num_tokens, bool)
    mask[places] = True
    block = select(block, mask)
    weights = block.topk_weights
    return replace(
        block,
        topk_ids=ids,
        layer_ids=token_rows.layer_ids,
        topk_weights=None if weights is None else weights[:, token_rows.rows],
    )


def _recorded_experts(path: Path) -> int | None:
    """What the archive's ``meta`` says, before any block is read."""
    with _opened(path) as (archive, members):
        for member in members:
            if member.filename == "meta.npy":
                meta = load_member(archive, member)
                return recorded_experts(metadata_of({"meta": meta}))
    return None


@contextmanager
def _opened(
    path: Path,
) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    """The archive and its members, after they were checked; damage is one error."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check_members(members, path.stat().st_size)
            yield archive, members
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error
    except Exception as error:  # zipfile and NumPy trip over damage in a dozen ways
        raise InvalidTraceError(
            f"{path}: damaged archive: {type(error).__name__}: {error}"
        ) from error


def _checked(path: Path, options: ImportOptions) -> Iterator[Trace]:
    with _opened(path) as (archive, members), ExitStack() as streams:
        opened = {
            member.filename[:-4]: streams.enter_context(archive.open(member))
            for member in members
            if member.filename[:-4] in _STREAMED
        }
        yield from _blocks(path, archive, members, opened, options)


def _blocks(
    path: Path,
    archive: zipfile.ZipFile,
    members: list[zipfile.ZipInfo],
    opened: Mapping[str, IO[bytes]],
    options: ImportOptions,
) -> Iterator[Trace]:
    small, streams = {}, {}
    for member in members:
        name = member.filename[:-4]
        if name not in opened:
            small[name] = load_member(archive, member)
            continue
        shape, fortran, dtype = read_header(name, opened[name], member.file_size)
        if fortran or len(shape) != 3:
            raise InvalidTraceError(
                f"{name} must be [tokens, layers, top_k] in C order, got {list(shape)}"
            )
        streams[name] = _Stream(shape, dtype, opened[name])
    num_tokens, num_layers, top_k = streams["experts"].shape
    lengths = {name: stream.shape[0] for name, stream in streams.items()}
    lengths |= {
        n: len(small[n]) if small[n].ndim else 0 for n in _PER_TOKEN & small.keys()
    }
    if set(lengths.values()) != {num_tokens}:
        raise InvalidTraceError(f"arrays differ in their number of tokens: {lengths}")
    numbers = next((small[n] for n in ("layer_ids", "layers") if n in small), None)
    if numbers is not None and options.layers is not None:
        _given_layers(numbers, options)
    recorded = numbers is not None
    token_rows = TokenRows(options)
    rows = block_rows(num_layers, top_k)
    for start in range(0, num_tokens, rows):
        stop = min(start + rows, num_tokens)
        arrays = dict(small)
        for name in _PER_TOKEN & small.keys():
            arrays[name] = small[name][start:stop]
        for name, stream in streams.items():
            arrays[name] = stream.rows(stop - start)
        block = per_token_trace(arrays, path)
        if options.top_k not in (None, block.top_k):
            raise InvalidTraceError(
                f"import: `top_k` is {options.top_k}, the archive has {block.top_k} "
                f"experts per token"
            )
        yield _named(block, token_rows, recorded)
        options.progress(stop, num_tokens)
