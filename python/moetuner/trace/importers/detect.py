"""Which kind of recording a file is, told by its content.

A kind is told by marks of its own (keys, names, magic bytes). An array without any is
looked at, and refused by name when it may be several things (`moetuner.trace.shapes`).
"""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.columns import Column, columns_of
from moetuner.trace.importers.json_text import first_values, json_values
from moetuner.trace.importers.loads import is_counts, tables_of
from moetuner.trace.importers.stored import StoredArray, open_npy, open_safetensors
from moetuner.trace.importers.table_rows import csv_header
from moetuner.trace.importers.torch_file import is_torch_file, pickle_start
from moetuner.trace.shapes import SAMPLE_ROWS, Meaning, judge

if TYPE_CHECKING:
    import os


class RecordingFormat(enum.Enum):
    """A kind of recording, by the name that ``--format`` takes."""

    SGLANG_RECORDER = "sglang-recorder"
    ROUTED_RESPONSES = "routed-responses"
    ROUTED_ARRAYS = "routed-arrays"
    TRTLLM = "trtllm"
    MEGATRON = "megatron"
    EPLB = "eplb"
    RANK_LOADS = "rank-loads"
    TABLE = "table"
    NPZ = "npz"


FOLDERS = {  # what a folder of recordings has in it
    "meta_info.json": RecordingFormat.TRTLLM,
    "expert_distribution_recorder_*.pt": RecordingFormat.SGLANG_RECORDER,
    "router_trace_rank*.jsonl": RecordingFormat.MEGATRON,
    "expert_distribution_rank*_timestamp*.csv": RecordingFormat.TABLE,
}
_START_BYTES = 1 << 16
_PACKED = "a compressed file: unpack it first"
_FOREIGN = {  # what files begin with that are easily made right
    b"\xef\xbb\xbf{": "JSON behind a byte order mark: save it as UTF-8 without one",
    b"\xef\xbb\xbf[": "JSON behind a byte order mark: save it as UTF-8 without one",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8",
    b"\x1f\x8b": _PACKED,
    b"BZh": _PACKED,
    b"\xfd7zXZ": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    b"7z\xbc\xaf": _PACKED,
}
_MEANINGS = {
    Meaning.EXPERTS: RecordingFormat.ROUTED_ARRAYS,
    Meaning.LOADS: RecordingFormat.EPLB,
    Meaning.RANK_LOADS: RecordingFormat.RANK_LOADS,
}
_RESPONSE_KEYS = (
    "routed_experts",
    "prompt_routed_experts",
    "completion_routed_experts",
)
_RESPONSE_PLACES = ("meta_info", "choices", "outputs", "sglext", "sgl_ext")


def detect_format(path: str | os.PathLike[str]) -> RecordingFormat:
    """The kind of a recording, told by its content.

    Raises
    ------
    InvalidTraceError
        When it is none that is known, or could be of two kinds; ``--format`` decides.
    MissingDependencyError
        When a file of ``torch.save`` has to be looked into, without torch.
    """
    path = Path(path)
    if path.is_dir():
        return _folder_format(path)
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start.startswith(b"PK"):
        return _zip_format(path)
    if start.startswith(b"\x93NUMPY"):
        return _array_format(path, open_npy(path))
    if start.startswith(b"PAR1"):
        return RecordingFormat.TABLE
    if start[8:9] == b"{" and not start.lstrip().startswith((b"{", b"[")):
        return _safetensors_format(path)
    if start.lstrip().startswith((b"{", b"[")):
        return _json_format(path, start)
    if not start:
        raise InvalidTraceError(f"{path}: an empty file")
    header = csv_header(start)
    if header is not None:
        columns = columns_of(header)
        if columns.are_counts or columns.are_routes:
            return RecordingFormat.TABLE
    for mark, advice in _FOREIGN.items():
        if start.startswith(mark):
            raise InvalidTraceError(f"{path}: {advice}")
    raise InvalidTraceError(
        f"{path}: no recording that moetuner knows (starts with {start[:8]!r}); "
        f"`format` forces one"
    )


def _folder_format(path: Path) -> RecordingFormat:
    kinds = [kind for glob, kind in FOLDERS.items() if any(path.glob(glob))]
    if len(kinds) > 1:
        names = " and ".join(kind.value for kind in kinds)
        raise InvalidTraceError(
            f"{path}: recordings of {names} in one folder; `format` takes one"
        )
    if kinds:
        return kinds[0]
    raise InvalidTraceError(
        f"{path}: a folder without meta_info.json (TensorRT-LLM), "
        f"router_trace_rank*.jsonl (Megatron), or expert_distribution_recorder_*.pt "
        f"or expert_distribution_rank*.csv (SGLang)"
    )


def _zip_format(path: Path) -> RecordingFormat:
    if not is_torch_file(path):
        return RecordingFormat.NPZ
    start = pickle_start(path)
    if b"records" in start or b"logical_count" in start:
        return RecordingFormat.SGLANG_RECORDER
    if b"physical_to_logical_map" in start:
        raise InvalidTraceError(
            f"{path}: a placement, not a recording: moetuner import-placement reads it"
        )
    return _tables_format(path)


def _tables_format(path: Path) -> RecordingFormat:
    """Of a file that holds arrays: loads by name, or what the arrays look like."""
    try:
        found = list(tables_of(path))
    except InvalidTraceError as error:
        text = str(error)
        raise InvalidTraceError(
            text if text.startswith(str(path)) else f"{path}: {text}"
        ) from error
    kinds = {
        RecordingFormat.EPLB if loads.named else _array_format(path, loads.table)
        for loads in found
    }
    if len(kinds) != 1:
        names = " and ".join(sorted(kind.value for kind in kinds)) or "nothing"
        raise InvalidTraceError(
            f"{path}: arrays in it look like {names}; `format` forces one"
        )
    return kinds.pop()


def _array_format(path: Path, array: Any) -> RecordingFormat:
    if not isinstance(array, StoredArray):
        sample = array[:SAMPLE_ROWS]
    else:
        sample = array.read(0, SAMPLE_ROWS) if array.shape else array.read()
    try:
        return _MEANINGS[judge(sample, array.shape)]
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{path}: {error}") from error


def _safetensors_format(path: Path) -> RecordingFormat:
    names = open_safetensors(path)
    own = {"topk_ids", "layer_ids"}, {"counts", "num_tokens", "layer_ids"}
    if any(needed <= names.keys() for needed in own):
        raise InvalidTraceError(f"{path}: a trace of moetuner already")
    if any(re.fullmatch(r"\d+_\d+", name) for name in names):
        raise InvalidTraceError(
            f"{path}: one rank of TensorRT-LLM statistics; import their folder"
        )
    return _tables_format(path)


def _json_format(path: Path, start: bytes) -> RecordingFormat:
    values = first_values(start)
    if not values:  # one value, longer than what was looked at, or damage
        values = [value for _, value in json_values(path)][:16]
    flat = [
        v
        for value in values
        for v in (value[:16] if isinstance(value, list) else [value])
    ]
    objects = [value for value in flat if isinstance(value, dict)]
    for one in objects:
        if one.get("format") == "moetuner.placement":
            raise InvalidTraceError(f"{path}: a placement, not a recording")
        if "physical_to_logical_map" in one:
            raise InvalidTraceError(
                f"{path}: a placement, not a recording: moetuner import-placement "
                f"reads it"
            )
    if any("top_indices" in one and "topk" in one for one in objects) or any(
        "top_indices" in one and "step" in one for one in objects
    ):
        return RecordingFormat.MEGATRON
    if any(_is_response(one) for one in objects):
        return RecordingFormat.ROUTED_RESPONSES
    for one in objects:
        columns = columns_of(one)
        if columns.are_counts or columns.are_routes:
            return RecordingFormat.TABLE
    if any(is_counts(one) for one in objects):
        return RecordingFormat.EPLB
    if not objects and isinstance(values[0], list):
        return _tables_format(path)
    raise InvalidTraceError(
        f"{path}: JSON with neither 'routed_experts' (responses of SGLang and vLLM), "
        f"'top_indices' (Megatron), loads ('logical_count', or by layer), nor a route "
        f"a line; `format` forces one"
    )


def _is_response(value: dict[str, Any]) -> bool:
    """Whether it is a server's answer: its keys, and no layer of its own."""
    if any(isinstance(value.get(name), dict | list) for name in _RESPONSE_PLACES):
        return True
    experts = next((value[name] for name in _RESPONSE_KEYS if value.get(name)), None)
    if experts is None or Column.LAYER in columns_of(value).names:
        return False
    return not isinstance(experts, list) or _depth(experts) == 3


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value and depth < 4:
        value, depth = value[0], depth + 1
    return depth
