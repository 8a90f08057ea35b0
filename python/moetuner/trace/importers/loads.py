"""Tables of expert loads out of whatever file holds them.

``.npy``, ``.npz``, safetensors, ``.pt`` and JSON: an array [layers, experts], a stack
of those, one under a known name among other things, an array for each layer
(``layer_3``), or JSON objects of them. Numbers beside them (steps, ranks, times) are
passed over.

Legend: L layers, E experts, Q groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.json_text import json_values
from moetuner.trace.importers.layers import MAX_LAYER, layer_number
from moetuner.trace.importers.stored import StoredArray, open_npy, open_safetensors
from moetuner.trace.importers.torch_file import is_torch_file, read_torch_file
from moetuner.trace.model import MAX_EXPERTS
from moetuner.trace.npz import load_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

COUNT_NAMES = (
    "logical_count",
    "logical_expert_load",
    "global_expert_load",
    "expert_load",
    "expert_loads",
    "expert_counts",
    "expert_count",
    "tokens_per_expert",
    "num_tokens_per_expert",
    "counts",
    "loads",
    "load",
    "weight",
    "weights",
)
EXPERT_NAMES = ("num_experts", "num_routed_experts", "n_routed_experts")
TOP_K_NAMES = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token")
_LAYER_NAMES = ("layer_ids", "layers", "layer_index", "layer_indices")
_STEP_NAMES = ("step", "iteration", "iter", "forward_pass_id", "pass")
_ONE_LAYER = ("layer", "layer_id", "layer_idx")

Array = StoredArray | np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loads:
    """One table of loads.

    Parameters
    ----------
    table
        Numbers [L, E], or [Q, L, E].
    named
        Whether its name or its keys say that it holds loads, and not its shape alone.
    layer_ids
        The model's own layer numbers, or None.
    top_k
        Experts per token, or None.
    """

    table: Array
    named: bool = False
    layer_ids: tuple[int, ...] | None = None
    top_k: int | None = None


def tables_of(path: Path) -> Iterator[Loads]:
    """The tables of a file, one after the other.

    Raises
    ------
    InvalidTraceError
        When it is damaged, or holds none.
    MissingDependencyError
        When a file of ``torch.save`` is met without torch.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"\x93NUMPY"):
        yield Loads(table=open_npy(path))
    elif start.startswith(b"PK") and is_torch_file(path):
        yield from _of_torch(read_torch_file(path))
    elif start.startswith(b"PK"):
        yield from _of_arrays(load_arrays(path))
    elif start[8:] == b"{" and not start.lstrip().startswith((b"{", b"[")):
        arrays = open_safetensors(path)
        if "phy2log" in arrays:
            raise InvalidTraceError(
                "EPLB's placement (phy2log), not loads: moetuner import-placement "
                "reads it"
            )
        yield from _of_arrays(arrays)
    elif start.lstrip().startswith((b"{", b"[")):
        yield from _of_json_values([value for _, value in json_values(path)])
    else:
        raise InvalidTraceError(
            "neither .npy, .npz, safetensors, JSON nor a torch file"
        )


def arrays_of(path: Path) -> Iterator[Array]:
    """Every array of a file that has at least two axes, whatever its name.

    Raises
    ------
    InvalidTraceError
        When the file is damaged, or has none.
    MissingDependencyError
        When a file of ``torch.save`` is met without torch.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"\x93NUMPY") or start.lstrip().startswith(b"["):
        content: Any = [loads.table for loads in tables_of(path)]
    elif start.startswith(b"PK"):
        torch = is_torch_file(path)
        content = read_torch_file(path) if torch else load_arrays(path)
    else:
        content = open_safetensors(path)
    if isinstance(content, dict):
        content = list(content.values())
    found = [
        array
        for array in (content if isinstance(content, list) else [content])
        if isinstance(array, StoredArray | np.ndarray) and len(array.shape) > 1
    ]
    if not found:
        raise InvalidTraceError(f"{path}: no array [tokens, layers, top-k] in it")
    yield from found


def is_counts(value: Any) -> bool:
    """Whether a JSON object holds loads: under a known name, or by layer."""
    if not isinstance(value, dict):
        return False
    inner = value.get("layers")
    if isinstance(inner, dict) and _by_layer(inner):
        return True
    return any(
        isinstance(value.get(name), list | dict) for name in COUNT_NAMES
    ) or _by_layer(value)


def _of_torch(content: Any) -> Iterator[Loads]:
    if isinstance(content, StoredArray):
        yield Loads(table=content)
        return
    if isinstance(content, list):
        for one in content:
            yield from _of_torch(one)
        return
    if not isinstance(content, dict):
        raise InvalidTraceError(f"no tensor in it, but {type(content).__name__}")
    yield from _of_arrays({str(name): value for name, value in content.items()})


def _of_arrays(content: Mapping[str, Any]) -> Iterator[Loads]:
    """Loads among named arrays and numbers."""
    arrays = {
        name: value
        for name, value in content.items()
        if isinstance(value, StoredArray | np.ndarray) and len(value.shape)
    }
    top_k = _first_number(content, TOP_K_NAMES)
    layers = next((_layer_ids(content[name]) for name in _LAYER_NAMES
                   if content.get(name) is not None), None)  # fmt: skip
    for name in COUNT_NAMES:
        value = arrays.get(name)
        if value is not None and len(value.shape) in (2, 3):
            yield Loads(table=value, named=True, layer_ids=layers, top_k=top_k)
            return
        if value is not None and len(value.shape) == 4:
            raise InvalidTraceError(
                f"{name!r} has the shape {list(value.shape)}: wanted [layers, experts] "
                f"or [groups, layers, experts]"
            )
    rows = _rows_by_layer(arrays)
    if rows is not None:
        yield Loads(table=rows[1], named=True, layer_ids=tuple(rows[0]), top_k=top_k)
        return
    tables = [a for a in arrays.values() if len(a.shape) in (2, 3)]
    if not tables:
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        raise InvalidTraceError(
            f"no table of loads [layers, experts] in it, but {shapes!r:.200}"
        )
    for table in tables:
        yield Loads(table=table, layer_ids=layers, top_k=top_k)


def _rows_by_layer(
    arrays: Mapping[str, Array],
) -> tuple[list[int], NDArray[Any]] | None:
    """Layer numbers and the table of arrays [E] that are named by their layer."""
    if not arrays or any(len(array.shape) != 1 for array in arrays.values()):
        return None
    found = {}
    for name, array in arrays.items():
        number = layer_number(name)
        if number is None or number in found:
            return None
        found[number] = array
    sizes = {array.shape for array in found.values()}
    if len(sizes) != 1:
        raise InvalidTraceError(f"layers differ in experts: {sorted(sizes)[:8]}")
    order = sorted(found)
    rows = [
        array.read() if isinstance(array, StoredArray) else array
        for array in map(found.__getitem__, order)
    ]
    return order, np.stack(rows)


def _of_json_values(values: list[Any]) -> Iterator[Loads]:
    """Loads in JSON values; those of one layer each are put together by step."""
    single: dict[int, dict[int, NDArray[Any]]] = {}
    top_k: int | None = None
    for value in values:
        layer = _one_layer(value) if isinstance(value, dict) else None
        row = _one_row(value) if layer is not None else None
        if layer is None or row is None:
            yield from _of_json(value)
            continue
        top_k = _first_number(value, TOP_K_NAMES) or top_k
        step = _first_number(value, _STEP_NAMES) or 0
        at_step = single.setdefault(step, {})
        at_step[layer] = row + at_step[layer] if layer in at_step else row
    for step in sorted(single):
        rows = _rows_by_layer({str(n): row for n, row in single[step].items()})
        assert rows is not None
        yield Loads(table=rows[1], named=True, layer_ids=tuple(rows[0]), top_k=top_k)


def _one_layer(value: dict[str, Any]) -> int | None:
    """The layer that a row of counts is of, by its number or its name."""
    names = [value[key] for key in _ONE_LAYER if isinstance(value.get(key), str)]
    numbers = [layer_number(name) for name in names]
    return _first_number(value, _ONE_LAYER) if not numbers else numbers[0]


def _one_row(value: dict[str, Any]) -> NDArray[Any] | None:
    for name in COUNT_NAMES:
        row = value.get(name)
        if isinstance(row, list) and not any(isinstance(n, list) for n in row[:1]):
            return _array(row)
    return None


def _of_json(value: Any) -> Iterator[Loads]:
    if isinstance(value, list) and any(isinstance(one, dict) for one in value[:1]):
        yield from _of_json_values(value)
        return
    if isinstance(value, list):
        yield Loads(table=_array(value))
        return
    if not isinstance(value, dict):
        raise InvalidTraceError(f"wanted loads, got {type(value).__name__}")
    value = dict(value)
    for name in ("layers", *COUNT_NAMES):
        inner = value.get(name)
        if isinstance(inner, dict) and _by_layer(inner):
            value = {k: v for k, v in value.items() if k != name} | inner
            break
    if _by_layer(value):
        told = _first_number(value, EXPERT_NAMES) or 0
        rows = {n: v for n, v in value.items() if isinstance(v, list | dict)}
        top_k = {n: v for n, v in value.items() if n in TOP_K_NAMES}
        value = _dense_rows(rows, told) | top_k
    arrays = {
        name: _array(inner)
        if isinstance(inner, list) and name not in _LAYER_NAMES
        else inner
        for name, inner in value.items()
    }
    yield from _of_arrays(arrays)


def _by_layer(value: dict[str, Any]) -> bool:
    """Whether the keys are layers: each a number, all with a row of counts."""
    rows = {
        key: inner for key, inner in value.items() if isinstance(inner, list | dict)
    }
    return bool(rows) and all(
        layer_number(key) is not None
        and (
            all(type(n) in (int, float) for n in inner)
            if isinstance(inner, list)
            else all(
                re.fullmatch(r"\d{1,5}", str(e)) and type(n) in (int, float)
                for e, n in inner.items()
            )
        )
        for key, inner in rows.items()
    )


def _dense_rows(rows: dict[str, Any], told: int) -> dict[str, Any]:
    """Rows {expert: count} as lists, all of one length; at least `told`."""
    sparse = [row for row in rows.values() if isinstance(row, dict)]
    if not sparse:
        return rows
    size = 1 + max((int(expert) for row in sparse for expert in row), default=0)
    size = max(
        [told, size, *(len(row) for row in rows.values() if isinstance(row, list))]
    )
    if size > MAX_EXPERTS:
        raise InvalidTraceError(f"expert {size - 1} is beyond {MAX_EXPERTS - 1}")
    dense: dict[str, Any] = {}
    for name, row in rows.items():
        listed = row if isinstance(row, list) else [0] * size
        if isinstance(row, dict):
            for expert, count in row.items():
                listed[int(expert)] = count
        dense[name] = listed + [0] * (size - len(listed))
    return dense


def _array(value: list[Any]) -> NDArray[Any]:
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise InvalidTraceError(
            "rows of loads differ in length, or a number needs more than 64 bits"
        ) from error
    if array.dtype.kind not in "iuf":
        raise InvalidTraceError(f"loads must be numbers, got {array.dtype}")
    return array


def _first_number(content: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        numbers = _numbers(content.get(name))
        if numbers is not None and len(numbers) == 1:
            return numbers[0]
    return None


def _layer_ids(value: Any) -> tuple[int, ...] | None:
    """The layers of rows, each by its number or its name; None if it is neither."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and value and all(isinstance(n, str) for n in value):
        numbers = [layer_number(name) for name in value]
        for name, number in zip(value, numbers, strict=True):
            if number is None:
                raise InvalidTraceError(f"{name!r:.60} says no number of a layer")
        return tuple(number for number in numbers if number is not None)
    return _numbers(value)


def _numbers(value: Any) -> tuple[int, ...] | None:
    """Whole numbers of a number, a list or a small array; None if it is none."""
    if isinstance(value, StoredArray):
        value = value.read() if len(value.shape) < 2 else None
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist() if value.ndim < 2 else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list) or not value or len(value) > MAX_LAYER:
        return None
    whole = all(type(number) is int and 0 <= number < 1 << 62 for number in value)
    return tuple(value) if whole else None
