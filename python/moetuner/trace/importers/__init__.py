"""Recordings of serving engines and trainers, imported as traces.

One file per engine; each gives `Tokens`, which are written as they are read, or a
`CountTrace`, which says by its type what it cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetuner.errors import InvalidTraceError
from moetuner.trace.hints import TraceHints, hints_of
from moetuner.trace.importers.base import ImportOptions, Tokens, named
from moetuner.trace.importers.detect import FOLDERS, RecordingFormat, detect_format
from moetuner.trace.importers.eplb import read_eplb_weights, read_rank_loads
from moetuner.trace.importers.megatron import read_megatron_trace
from moetuner.trace.importers.npz_file import read_npz_recording
from moetuner.trace.importers.routed_experts import (
    read_routed_arrays,
    read_routed_responses,
)
from moetuner.trace.importers.sglang_recorder import read_sglang_recorder
from moetuner.trace.importers.tables import read_table
from moetuner.trace.importers.trtllm import read_trtllm_statistics
from moetuner.trace.safetensors_file import write_trace
from moetuner.trace.stream import TraceWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from moetuner.trace.importers.base import Importer
    from moetuner.trace.model import CountTrace

__all__ = [
    "ImportOptions",
    "Imported",
    "RecordingFormat",
    "detect_format",
    "import_recording",
]


IMPORTERS: dict[RecordingFormat, Importer] = {
    RecordingFormat.SGLANG_RECORDER: read_sglang_recorder,
    RecordingFormat.ROUTED_RESPONSES: read_routed_responses,
    RecordingFormat.ROUTED_ARRAYS: read_routed_arrays,
    RecordingFormat.TRTLLM: read_trtllm_statistics,
    RecordingFormat.MEGATRON: read_megatron_trace,
    RecordingFormat.EPLB: read_eplb_weights,
    RecordingFormat.RANK_LOADS: read_rank_loads,
    RecordingFormat.TABLE: read_table,
    RecordingFormat.NPZ: read_npz_recording,
}
_USED = {  # what recordings may leave open, by the names of `ImportOptions`
    RecordingFormat.SGLANG_RECORDER: {"num_experts", "top_k", "layers"},
    RecordingFormat.ROUTED_RESPONSES: {"num_experts", "num_layers", "top_k", "layers"},
    RecordingFormat.ROUTED_ARRAYS: {"num_experts", "layers"},
    RecordingFormat.TRTLLM: {"num_experts", "slot_experts"},
    RecordingFormat.MEGATRON: {"num_experts"},
    RecordingFormat.EPLB: {"num_experts", "top_k", "layers"},
    RecordingFormat.RANK_LOADS: {"num_experts", "top_k", "layers", "slot_experts"},
    RecordingFormat.TABLE: {"num_experts", "top_k", "layers"},
    RecordingFormat.NPZ: {"num_experts", "top_k", "layers"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import wrote.

    Parameters
    ----------
    format
        The kind of recording that it was.
    num_tokens, num_layers, num_experts
        Of the trace; choices of experts instead of tokens when `tokens_known` is False.
    missing
        Statistics that the recording cannot give; empty when tokens were recorded.
    """

    format: RecordingFormat
    num_tokens: int
    num_layers: int
    num_experts: int
    missing: tuple[str, ...] = ()
    tokens_known: bool = True


def import_recording(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    format: RecordingFormat | None = None,
    options: ImportOptions | None = None,
) -> Imported:
    """Turn a recording into a trace file, in bounded memory.

    Parameters
    ----------
    paths
        The files of one recording, those of all ranks; or the one folder of them.
    out
        The safetensors trace to write: complete, or not there.
    format
        The kind of recording; None tells it by the files' content.
    options
        What the recording does not say.

    Raises
    ------
    InvalidTraceError
        When the files are damaged, foreign, of different kinds, or do not say enough;
        the message says which option would help.
    MissingDependencyError
        When a file of ``torch.save`` is met without torch.
    FileNotFoundError
        When a file is not there.
    """
    options = options or ImportOptions()
    if not paths:
        raise InvalidTraceError("import: wanted at least one file, got none")
    given = [Path(path) for path in paths]
    kind = format or _common_format(given)
    _check_used(kind, options)
    try:
        found = IMPORTERS[kind](_files(given, kind), options)
    except InvalidTraceError as error:
        raise _of_file(given, error) from error
    if not isinstance(found, Tokens):
        found = replace(found, metadata=named(found.metadata, options))
        if not found.tokens_known:
            options.note(
                "nobody says how many experts a token has: choices are counted, not "
                "tokens; `top_k` says it, here or when the trace is read"
            )
        for text in hints_of(found):
            options.note(text)
        return _write_counts(found, out, kind)
    try:
        return _write_tokens(found, out, kind, options)
    except InvalidTraceError as error:  # blocks are read as they are written
        raise _of_file(given, error) from error


def _write_tokens(
    found: Tokens,
    out: str | os.PathLike[str],
    kind: RecordingFormat,
    options: ImportOptions,
) -> Imported:
    num_experts = options.num_experts or found.num_experts
    with TraceWriter(out, num_experts=num_experts) as writer:
        hints = TraceHints()
        for block in found.blocks:
            writer.append(block)
            hints.add(block)
        for name in found.drop:
            writer.forget(name)
        if num_experts is None:
            options.note(
                f"the recording does not say how many experts there are: "
                f"{writer.num_experts}, the largest id plus one; `num_experts` says "
                f"otherwise"
            )
        for text in hints.texts():
            options.note(text)
        writer.finish(named(writer.metadata, options, found.source))
        return Imported(
            format=kind,
            num_tokens=writer.num_tokens,
            num_layers=writer.num_layers,
            num_experts=writer.num_experts,
        )


def _of_file(given: list[Path], error: InvalidTraceError) -> InvalidTraceError:
    """The error with the file's name, where it is about the one file that was given."""
    text = str(error)
    if len(given) > 1 or text.startswith("import: ") or str(given[0]) in text:
        return error
    return InvalidTraceError(f"{given[0]}: {text}")


def _check_used(kind: RecordingFormat, options: ImportOptions) -> None:
    """Refuse options that would be passed over."""
    for name in ("num_experts", "num_layers", "top_k", "layers", "slot_experts"):
        if name not in _USED[kind] and getattr(options, name) is not None:
            raise InvalidTraceError(
                f"import: `{name}` means nothing for a {kind.value} recording: leave "
                f"it out"
            )


def _common_format(paths: list[Path]) -> RecordingFormat:
    kinds = {path: detect_format(path) for path in paths}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{path} {kind.value}" for path, kind in kinds.items())
        raise InvalidTraceError(f"import: recordings of different kinds: {listed}")
    return next(iter(kinds.values()))


def _files(paths: list[Path], kind: RecordingFormat) -> list[Path]:
    """The files of the recording, folders replaced by what lies in them."""
    if kind is RecordingFormat.TRTLLM:
        return paths
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = [
            file
            for pattern, its_kind in FOLDERS.items()
            if its_kind is kind
            for file in sorted(path.glob(pattern))
        ]
        if not inside:
            raise InvalidTraceError(f"{path}: a folder without files of {kind.value}")
        files += inside
    if len({file.resolve() for file in files}) < len(files):
        raise InvalidTraceError("import: a file is given twice")
    return files


def _write_counts(
    trace: CountTrace, out: str | os.PathLike[str], kind: RecordingFormat
) -> Imported:
    write_trace(trace, out)
    return Imported(
        format=kind,
        num_tokens=int(trace.num_tokens.sum()),
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        missing=trace.missing,
        tokens_known=trace.tokens_known,
    )
