"""Placement files: JSON with a format, a version, the slot map and its provenance."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._files import atomic_write_text
from moetuner._words import amount
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.placement.model import Placement, ProgressPoint, Provenance
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

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
_OPTIONAL = {
    "model": str,
    "slots_per_rank": int,
    "provenance": dict,
    "progress": list,
}
_NUMBER = (int, float, type(None))
_PROVENANCE: dict[str, type | tuple[type, ...]] = {
    "solver": str,
    "objective": str,
    "value": _NUMBER,
    "lower_bound": _NUMBER,
    "status": str,
    "seconds": _NUMBER,
    "trace_sha256": str,
    "other_traces": list,
    "options": dict,
    "versions": dict,
    "validation": dict,
}
_PROGRESS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "seconds": (int, float),
    "incumbent": _NUMBER,
    "bound": _NUMBER,
}
_MAX_PROGRESS = 10_000
_INT32_MAX = 2**31 - 1


def write_placement(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Write `placement` as JSON, one line per layer and per point of progress.

    An old file is replaced whole.

    Raises
    ------
    InvalidPlacementError
        When the provenance holds something that JSON cannot.
    """
    provenance = dataclasses.asdict(placement.provenance)
    points = provenance.pop("progress")
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
    try:
        body = json.dumps(head, indent=2, allow_nan=False)[:-2]
        lines = ",\n".join(
            f"    {json.dumps(point, allow_nan=False)}" for point in points
        )
    except (TypeError, ValueError) as error:
        raise InvalidPlacementError(
            f"write_placement: provenance cannot be written as JSON: {error}"
        ) from error
    progress = f'  "progress": [\n{lines}\n  ],\n' if points else ""
    atomic_write_text(path, f'{body},\n{progress}  "layers": {{\n{layers}\n  }}\n}}\n')


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
        content = json.loads(
            file.read_bytes(),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except InvalidPlacementError as error:
        raise InvalidPlacementError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidPlacementError(f"{path}: not JSON: {error}") from error
    try:
        return _parse(content)
    except (InvalidPlacementError, InvalidProblemError) as error:
        raise InvalidPlacementError(f"{path}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise InvalidPlacementError(f"key {key!r:.40} is there twice")
        content[key] = value
    return content


def _refuse_constant(text: str) -> Any:
    raise InvalidPlacementError(f"{text} is not a number that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise InvalidPlacementError(f"{text:.40} is too large a number")
    return value


def _parse(content: Any) -> Placement:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise InvalidPlacementError(
            f"not a placement file: format is {_short(found)}, wanted {FORMAT!r}"
        )
    optional = {key: kind for key, kind in _OPTIONAL.items() if key in content}
    for key, kind in (_REQUIRED | optional).items():
        if key not in content:
            raise InvalidPlacementError(f"key {key!r} is missing")
        _check_type(f"key {key!r}", content[key], kind)
        if kind is int and abs(content[key]) > _INT32_MAX:
            raise InvalidPlacementError(
                f"key {key!r} is too large: {_short(content[key])}"
            )
    if content["version"] != VERSION:
        raise InvalidPlacementError(
            f"version {content['version']}; this moetuner reads version {VERSION}"
        )
    if not 1 <= content["num_experts"] <= 32767:
        raise InvalidPlacementError(
            f"num_experts must be 1..32767, got {content['num_experts']}"
        )
    rows = {_layer_number(key): row for key, row in content["layers"].items()}
    layer_ids = sorted(rows)
    placement = Placement(
        slot_experts=_slot_experts({layer: rows[layer] for layer in layer_ids}),
        layer_ids=np.array(layer_ids, np.int32),
        num_experts=content["num_experts"],
        topology=Topology(
            num_ranks=content["num_ranks"], ranks_per_node=content["ranks_per_node"]
        ),
        provenance=_provenance(content),
    )
    claimed = content.get("slots_per_rank", placement.slots_per_rank)
    if claimed != placement.slots_per_rank:
        raise InvalidPlacementError(
            f"slots_per_rank is {claimed}, but layers hold "
            f"{amount(placement.num_slots, 'slot')} for "
            f"{amount(placement.topology.num_ranks, 'rank')}"
        )
    return placement


def _check_type(where: str, value: Any, kind: type | tuple[type, ...]) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = ("null" if each is type(None) else each.__name__ for each in kinds)
        wanted = " or ".join(names)
        raise InvalidPlacementError(f"{where} must be {wanted}, got {_short(value)}")


def _short(value: Any) -> str:
    """Value as text of bounded length; what is nested too deep only by its type."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return f"a deep {type(value).__name__}"


def _layer_number(key: str) -> int:
    # Written in one way only: "01" beside "1" would be one layer twice.
    decimal = key.isascii() and key.isdecimal() and len(key) <= 10
    if not decimal or str(int(key)) != key or int(key) > _INT32_MAX:
        raise InvalidPlacementError(f"layer {key!r:.40} is not a layer number")
    return int(key)


def _slot_experts(rows: dict[int, Any]) -> NDArray[np.int32]:
    if not rows:
        raise InvalidPlacementError("no layers")
    first = next(iter(rows.values()))
    width = len(first) if isinstance(first, list) else 0
    for layer, row in rows.items():
        if not isinstance(row, list) or len(row) != width or not width:
            raise InvalidPlacementError(
                f"layer {layer} must list one expert id per slot, as many as the "
                f"other layers ({width})"
            )
        for expert in row:
            if type(expert) is not int or not -1 <= expert <= 32767:
                raise InvalidPlacementError(
                    f"layer {layer} holds {_short(expert)}, not an expert id"
                )
    return np.array(list(rows.values()), np.int32)


def _provenance(content: dict[str, Any]) -> Provenance:
    """What the file says of its origin; keys that this version knows."""
    given = content.get("provenance", {})
    kept = {key: given[key] for key in _PROVENANCE if key in given}
    for key, value in kept.items():
        _check_type(f"provenance {key!r}", value, _PROVENANCE[key])
    kept["other_traces"] = tuple(kept.get("other_traces", ()))
    for value in (*kept["other_traces"], *kept.get("versions", {}).values()):
        _check_type("provenance 'other_traces' and 'versions' hold", value, str)
    progress = _progress(content.get("progress", []))
    return Provenance(model=content.get("model", ""), progress=progress, **kept)


def _progress(given: list[Any]) -> tuple[ProgressPoint, ...]:
    """How the solver came along; keys that this version knows."""
    if len(given) > _MAX_PROGRESS:
        raise InvalidPlacementError(
            f"progress has {len(given)} points, at most {_MAX_PROGRESS} are read"
        )
    points = []
    for point in given:
        _check_type("a point of progress", point, dict)
        for key in ("stage", "seconds"):
            if key not in point:
                raise InvalidPlacementError(f"a point of progress lacks {key!r}")
        kept = {key: point[key] for key in _PROGRESS if key in point}
        for key, value in kept.items():
            _check_type(f"progress {key!r}", value, _PROGRESS[key])
        points.append(ProgressPoint(**kept))
    return tuple(points)
