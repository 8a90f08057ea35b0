"""Recordings of serving engines and trainers, imported as traces.

One file per engine; each gives `Tokens`, which are written as they are read, or a
`CountTrace`, which says by its type what it cannot tell.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import ImportOptions, Tokens, named
from moetuner.trace.importers.eplb import read_eplb_weights
from moetuner.trace.importers.megatron import read_megatron_trace
from moetuner.trace.importers.npz_file import read_npz_recording
from moetuner.trace.importers.routed_experts import (
    read_routed_arrays,
    read_routed_responses,
)
from moetuner.trace.importers.sglang_recorder import read_sglang_recorder
from moetuner.trace.importers.stored import open_npy, open_safetensors
from moetuner.trace.importers.torch_file import is_torch_file, pickle_start
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


class RecordingFormat(enum.Enum):
    """A kind of recording, by the name that ``--format`` takes."""

    SGLANG_RECORDER = "sglang-recorder"
    ROUTED_RESPONSES = "routed-responses"
    ROUTED_ARRAYS = "routed-arrays"
    TRTLLM = "trtllm"
    MEGATRON = "megatron"
    EPLB = "eplb"
    NPZ = "npz"


IMPORTERS: dict[RecordingFormat, Importer] = {
    RecordingFormat.SGLANG_RECORDER: read_sglang_recorder,
    RecordingFormat.ROUTED_RESPONSES: read_routed_responses,
    RecordingFormat.ROUTED_ARRAYS: read_routed_arrays,
    RecordingFormat.TRTLLM: read_trtllm_statistics,
    RecordingFormat.MEGATRON: read_megatron_trace,
    RecordingFormat.EPLB: read_eplb_weights,
    RecordingFormat.NPZ: read_npz_recording,
}
_USED = {  # what recordings may leave open, by the names of `ImportOptions`
    RecordingFormat.SGLANG_RECORDER: {"num_experts", "top_k", "layers"},
    RecordingFormat.ROUTED_RESPONSES: {"num_experts", "num_layers", "top_k", "layers"},
    RecordingFormat.ROUTED_ARRAYS: {"num_experts", "layers"},
    RecordingFormat.TRTLLM: {"num_experts", "slot_experts"},
    RecordingFormat.MEGATRON: {"num_experts"},
    RecordingFormat.EPLB: {"num_experts", "top_k", "layers"},
    RecordingFormat.NPZ: {"num_experts"},
}
_START_BYTES = 1 << 16
_FOLDERS = {  # what a folder of recordings has in it
    "meta_info.json": RecordingFormat.TRTLLM,
    "expert_distribution_recorder_*.pt": RecordingFormat.SGLANG_RECORDER,
    "router_trace_rank*.jsonl": RecordingFormat.MEGATRON,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import wrote.

    Parameters
    ----------
    format
        The kind of recording that it was.
    num_tokens, num_layers, num_experts
        Of the trace.
    missing
        Statistics that the recording cannot give; empty when tokens were recorded.
    """

    format: RecordingFormat
    num_tokens: int
    num_layers: int
    num_experts: int
    missing: tuple[str, ...] = ()


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
    found = IMPORTERS[kind](_files(given, kind), options)
    if not isinstance(found, Tokens):
        found = replace(found, metadata=named(found.metadata, options))
        return _write_counts(found, out, kind)
    num_experts = options.num_experts or found.num_experts
    with TraceWriter(out, num_experts=num_experts) as writer:
        for block in found.blocks:
            writer.append(block)
        for name in found.drop:
            writer.forget(name)
        if num_experts is None:
            options.note(
                f"the recording does not say how many experts there are: "
                f"{writer.num_experts}, the largest id plus one; --num-experts says "
                f"otherwise"
            )
        writer.finish(named(writer.metadata, options, found.source))
        return Imported(
            format=kind,
            num_tokens=writer.num_tokens,
            num_layers=writer.num_layers,
            num_experts=writer.num_experts,
        )


def _check_used(kind: RecordingFormat, options: ImportOptions) -> None:
    """Refuse options that would be passed over."""
    for name in ("num_experts", "num_layers", "top_k", "layers", "slot_experts"):
        if name not in _USED[kind] and getattr(options, name) is not None:
            flag = {"slot_experts": "placement"}.get(name, name).replace("_", "-")
            raise InvalidTraceError(
                f"import: --{flag} means nothing for a {kind.value} recording: leave "
                f"it out"
            )


def detect_format(path: str | os.PathLike[str]) -> RecordingFormat:
    """The kind of a recording, told by its content.

    Raises
    ------
    InvalidTraceError
        When it is none that is known, or could be of two kinds; ``--format`` decides.
    """
    path = Path(path)
    if path.is_dir():
        kinds = [kind for glob, kind in _FOLDERS.items() if any(path.glob(glob))]
        if len(kinds) > 1:
            names = " and ".join(kind.value for kind in kinds)
            raise InvalidTraceError(
                f"{path}: recordings of {names} in one folder; --format takes one"
            )
        if kinds:
            return kinds[0]
        raise InvalidTraceError(
            f"{path}: a folder without meta_info.json (TensorRT-LLM), "
            f"router_trace_rank*.jsonl (Megatron) or expert_distribution_recorder_*.pt "
            f"(SGLang)"
        )
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start.startswith(b"PK"):
        return _zip_format(path)
    if start.startswith(b"\x93NUMPY"):
        return _npy_format(path)
    if start[8:9] == b"{" and not start.lstrip().startswith((b"{", b"[")):
        return _safetensors_format(path)
    if start.lstrip().startswith((b"{", b"[")):
        return _json_format(path, start)
    if not start:
        raise InvalidTraceError(f"{path}: an empty file")
    raise InvalidTraceError(
        f"{path}: no recording that moetuner knows (starts with {start[:8]!r}); "
        f"--format forces one"
    )


def _zip_format(path: Path) -> RecordingFormat:
    if not is_torch_file(path):
        return RecordingFormat.NPZ
    start = pickle_start(path)
    if b"records" in start or b"logical_count" in start:
        return RecordingFormat.SGLANG_RECORDER
    return RecordingFormat.EPLB


def _npy_format(path: Path) -> RecordingFormat:
    array = open_npy(path)
    if len(array.shape) == 2:
        return RecordingFormat.EPLB
    if len(array.shape) == 3 and array.dtype in ("u1", "u2"):
        return RecordingFormat.ROUTED_ARRAYS
    if len(array.shape) != 3:
        raise InvalidTraceError(
            f"{path}: an array {list(array.shape)}; wanted a request's experts "
            f"[tokens, layers, top-k] or loads [layers, experts]"
        )
    raise InvalidTraceError(
        f"{path}: an array {list(array.shape)} of {array.dtype} may hold a request's "
        f"experts [tokens, layers, top-k] or loads [groups, layers, experts]: say "
        f"--format routed-arrays or --format eplb"
    )


def _safetensors_format(path: Path) -> RecordingFormat:
    names = open_safetensors(path)
    if "topk_ids" in names or "counts" in names:
        raise InvalidTraceError(f"{path}: a trace of moetuner already")
    if any(re.fullmatch(r"\d+_\d+", name) for name in names):
        raise InvalidTraceError(
            f"{path}: one rank of TensorRT-LLM statistics; import their folder"
        )
    return RecordingFormat.EPLB


def _json_format(path: Path, start: bytes) -> RecordingFormat:
    line = start.split(b"\n", 1)[0]
    try:
        first: Any = json.loads(line)
    except (ValueError, RecursionError):
        first = None  # a line longer than what was looked at: told by its names
    if isinstance(first, dict) and first.get("format") == "moetuner.placement":
        raise InvalidTraceError(f"{path}: a placement, not a recording")
    if b'"top_indices"' in line:
        return RecordingFormat.MEGATRON
    keys = (b'"routed_experts"', b'"meta_info"', b'"choices"', b'"sglext"')
    if any(key in line for key in keys):
        return RecordingFormat.ROUTED_RESPONSES
    raise InvalidTraceError(
        f"{path}: JSON lines with neither 'routed_experts' (responses of SGLang and "
        f"vLLM) nor 'top_indices' (Megatron); --format forces one"
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
            for pattern, its_kind in _FOLDERS.items()
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
    )
