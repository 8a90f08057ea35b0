"""Placements in the files of serving engines, written and read.

One file per engine. Engines ignore a placement without a word when something else is
not switched on: each export also says the command line that loads it and what it needs.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetuner._files import atomic_write_bytes
from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.export.base import ExportOptions, ReadOptions, read_json, to_placement
from moetuner.export.deepep import write_deepep
from moetuner.export.engine import Engine
from moetuner.export.eplb import read_eplb, write_eplb
from moetuner.export.padding import fill_slots
from moetuner.export.replica_rules import other_rule_note
from moetuner.export.sglang import KEY as SGLANG_KEY
from moetuner.export.sglang import read_sglang, write_sglang
from moetuner.export.trtllm import read_trtllm, write_trtllm
from moetuner.export.vllm import (
    read_start_map,
    read_vllm,
    write_start_map,
    write_vllm,
)
from moetuner.export.vllm_ascend import read_vllm_ascend, write_vllm_ascend
from moetuner.trace.importers.torch_file import is_torch_file, pickle_start

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from moetuner.export.base import SlotMap, Written
    from moetuner.placement.model import Placement

__all__ = [
    "Engine",
    "ExportOptions",
    "Exported",
    "ReadOptions",
    "detect_engine",
    "export_placement",
    "fill_slots",
    "read_engine_placement",
]


_WRITERS: dict[Engine, Callable[[Placement, ExportOptions], Written]] = {
    Engine.SGLANG: write_sglang,
    Engine.TRTLLM: write_trtllm,
    Engine.VLLM_ASCEND: write_vllm_ascend,
    Engine.VLLM: write_vllm,
    Engine.VLLM_START_MAP: write_start_map,
    Engine.EPLB: write_eplb,
    Engine.DEEPEP: write_deepep,
}
_READERS: dict[Engine, Callable[[Path], SlotMap]] = {
    Engine.SGLANG: read_sglang,
    Engine.TRTLLM: read_trtllm,
    Engine.VLLM_ASCEND: read_vllm_ascend,
    Engine.VLLM: read_vllm,
    Engine.VLLM_START_MAP: read_start_map,
    Engine.EPLB: read_eplb,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export wrote, and what to do with it.

    Parameters
    ----------
    engine
        Whose file it is.
    command
        Command line that loads it.
    notes
        What must be switched on for it to matter, and what it cannot say.
    num_replicas
        Spare slots that were filled, over all layers.
    extra_bytes
        Weights in them over all ranks; None when an expert's size is unknown.
    """

    engine: Engine
    command: str
    notes: tuple[str, ...]
    num_replicas: int
    extra_bytes: float | None


def export_placement(
    placement: Placement,
    out: str | os.PathLike[str],
    engine: Engine,
    *,
    options: ExportOptions | None = None,
) -> Exported:
    """Write a placement as the file that `engine` loads.

    Raises
    ------
    InvalidPlacementError
        When the engine's file cannot say what the placement says, or needs an option.
    """
    options = options or ExportOptions()
    written = _WRITERS[engine](placement, options)
    atomic_write_bytes(out, written.data)
    added = int((placement.slot_experts < 0).sum()) if written.fills else 0
    return Exported(
        engine=engine,
        command=_with_path(written.command, str(out)),
        notes=(
            *other_rule_note(placement, engine),
            *written.notes,
            *_filled(added, engine, options),
        ),
        num_replicas=added,
        extra_bytes=(
            None if options.expert_bytes is None else added * options.expert_bytes
        ),
    )


def _filled(added: int, engine: Engine, options: ExportOptions) -> tuple[str, ...]:
    """Which rule filled the spare slots."""
    if not added:
        return ()
    if options.load is not None:
        return (
            "spare slots hold the coldest expert that their rank lacks: an engine "
            "reads every expert that a token of the batch chose",
        )
    if engine is Engine.VLLM_ASCEND:
        return (
            "spare slots hold any expert of another rank, with a share of its tokens: "
            "say `load`, for the coldest one costs least",
        )
    return (
        "spare slots repeat any expert of their own rank, which is then read twice: "
        "say `load`, for the coldest one costs least",
    )


def _with_path(command: str, path: str) -> str:
    """The command with the file's name, written as its place in there asks."""
    inner = json.dumps(path, ensure_ascii=False)[1:-1]
    spelled = {
        "{path}": shlex.quote(path),
        "{json}": inner.replace("'", "'\\''"),
        "{string}": inner,
    }
    return re.sub(
        "|".join(map(re.escape, spelled)), lambda m: spelled[m.group()], command
    )


def read_engine_placement(
    path: str | os.PathLike[str],
    *,
    engine: Engine | None = None,
    options: ReadOptions | None = None,
) -> Placement:
    """Read an engine's placement file; None tells the engine by the content.

    Raises
    ------
    InvalidPlacementError
        When it is no such file, does not say enough, or is no legal placement.
    MissingDependencyError
        When YAML is met without PyYAML.
    """
    file = Path(path)
    if file.is_dir():
        raise InvalidPlacementError(f"{path}: a folder, wanted a placement file")
    engine = engine or detect_engine(file)
    if engine not in _READERS:
        readable = ", ".join(each.value for each in _READERS)
        raise InvalidPlacementError(
            f"{path}: files of {engine.value} are only written; read are {readable}"
        )
    return to_placement(
        _READERS[engine](file), options or ReadOptions(), f"{engine.value} file"
    )


def detect_engine(path: str | os.PathLike[str]) -> Engine:
    """Whose placement file it is, told by its content.

    Raises
    ------
    InvalidPlacementError
        When it is nobody's that moetuner knows.
    """
    file = Path(path)
    with file.open("rb") as stream:
        start = stream.read(4096)
    if start.startswith(b"\x93NUMPY"):
        return Engine.EPLB
    if start.startswith(b"PK") and is_torch_file(file):
        try:
            names = pickle_start(file)
        except InvalidTraceError as error:
            raise InvalidPlacementError(str(error)) from error
        sglang = SGLANG_KEY.encode() in names
        return Engine.SGLANG if sglang else Engine.VLLM_START_MAP
    if start[8:9] == b"{" and not start.lstrip().startswith((b"{", b"[")):
        return Engine.EPLB
    if start.lstrip().startswith(b"["):
        return Engine.VLLM
    if start.lstrip().startswith(b"{"):
        content = read_json(file)
        for key, engine in (
            (SGLANG_KEY, Engine.SGLANG),
            ("layer_list", Engine.VLLM_ASCEND),
            ("expert_to_ep_rank", Engine.VLLM),
        ):
            if key in content:
                return engine
    elif b"num_slots:" in start or b"initial_global_assignments:" in start:
        return Engine.TRTLLM
    raise InvalidPlacementError(
        f"{path}: no placement file of SGLang, TensorRT-LLM, vllm-ascend, vLLM or EPLB "
        f"(starts with {start[:16]!r})"
    )
