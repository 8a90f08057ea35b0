"""Placement files: JSON with a format, a version, the slot map and its provenance."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._files import atomic_write_text
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.placement import Placement, Provenance
from moetuner.topology import Topology

if TYPE_CHECKING:
    import os

FORMAT = "moetuner.placement"
VERSION = 1
_MAX_BYTES = 1 << 28
_REQUIRED = {
    "format": str,
    "version": int,
    "num_experts": int,
    "num_ranks": int,
    "ranks_per_node": int,
    "layers": dict,
}


def write_placement(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Write `placement` as JSON, one line per layer; an old file is replaced whole."""
    provenance = dataclasses.asdict(placement.provenance)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": provenance.pop("model"),
        "num_experts": placement.num_experts,
        "num_ranks": placement.topology.num_ranks,
        "ranks_per_node": placement.topology.ranks_per_node,
        "slots_per_rank": placement.slots_per_rank,
        "provenance": provenance,
    }
    layers = ",\n".join(
        f"    {json.dumps(str(layer))}: {json.dumps(row.tolist())}"
        for layer, row in zip(
            placement.layer_ids.tolist(), placement.slot_experts, strict=True
        )
    )
    body = json.dumps(head, indent=2, allow_nan=False)[:-2]
    atomic_write_text(path, f'{body},\n  "layers": {{\n{layers}\n  }}\n}}\n')


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """Read a placement file.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    InvalidPlacementError
        When it is not JSON, of another format or version, or not a legal placement.
    """
    file = Path(path)
    if file.is_dir():
        raise InvalidPlacementError(f"{path}: a folder, wanted a placement file")
    if file.stat().st_size > _MAX_BYTES:
        raise InvalidPlacementError(f"{path}: larger than {_MAX_BYTES} bytes")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidPlacementError(f"{path}: not JSON: {error}") from error
    try:
        return _parse(content)
    except (InvalidPlacementError, InvalidProblemError) as error:
        raise InvalidPlacementError(f"{path}: {error}") from error


def _parse(content: Any) -> Placement:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise InvalidPlacementError(
            f"not a placement file: format is {found!r}, wanted {FORMAT!r}"
        )
    for key, kind in _REQUIRED.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InvalidPlacementError(
                f"key {key!r} must be {kind.__name__}, got {value!r:.60}"
            )
    if content["version"] != VERSION:
        raise InvalidPlacementError(
            f"version {content['version']}; this moetuner reads version {VERSION}"
        )
    if not 1 <= content["num_experts"] <= 32767:
        raise InvalidPlacementError(
            f"num_experts must be 1..32767, got {content['num_experts']}"
        )
    rows = sorted((_layer_number(key), row) for key, row in content["layers"].items())
    return Placement(
        slot_experts=_slot_experts(dict(rows)),
        layer_ids=np.array([layer for layer, _ in rows], np.int32),
        num_experts=content["num_experts"],
        topology=Topology(
            num_ranks=content["num_ranks"], ranks_per_node=content["ranks_per_node"]
        ),
        provenance=_provenance(content),
    )


def _layer_number(key: str) -> int:
    if not key.isdecimal() or len(key) > 6:
        raise InvalidPlacementError(f"layer {key!r:.40} is not a layer number")
    return int(key)


def _slot_experts(rows: dict[int, Any]) -> Any:
    if not rows:
        raise InvalidPlacementError("no layers")
    width = (
        len(next(iter(rows.values())))
        if isinstance(next(iter(rows.values())), list)
        else 0
    )
    for layer, row in rows.items():
        if not isinstance(row, list) or len(row) != width or not width:
            raise InvalidPlacementError(
                f"layer {layer} must list one expert id per slot, as many as the "
                f"other layers ({width})"
            )
        for expert in row:
            if type(expert) is not int or not -1 <= expert <= 32767:
                raise InvalidPlacementError(
                    f"layer {layer} holds {expert!r:.40}, not an expert id"
                )
    return np.array(list(rows.values()), np.int32)


def _provenance(content: dict[str, Any]) -> Provenance:
    """What the file says of its origin; free text, so anything odd is left out."""
    given = content.get("provenance", {})
    if not isinstance(given, dict):
        raise InvalidPlacementError("provenance must be an object")
    known = {field.name for field in dataclasses.fields(Provenance)}
    kept = {key: value for key, value in given.items() if key in known}
    return Provenance(**(kept | {"model": str(content.get("model", ""))}))
