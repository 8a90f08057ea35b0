"""Tables with a route, or a count, a row: CSV, JSON lines, Parquet.

Loggers write one row for each token and layer, with a list of experts or a column each,
or one row for each choice; what the columns are called is in `columns`. SGLang's older
recorder writes ``layer_id,expert_id,count``, one file for each rank.

Legend: N rows, T tokens, L layers, K top-k, E experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import Tokens
from moetuner.trace.importers.cells import (
    expert_rows,
    integer,
    is_decode,
    listed,
    weight_rows,
)
from moetuner.trace.importers.columns import Column, Columns, check_routes, columns_of
from moetuner.trace.importers.counting import count_trace
from moetuner.trace.importers.layers import MAX_LAYER, layer_number
from moetuner.trace.importers.loads import EXPERT_NAMES, TOP_K_NAMES
from moetuner.trace.importers.routes import Routes, traces_of
from moetuner.trace.importers.table_rows import chunks_of
from moetuner.trace.model import MAX_EXPERTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.model import CountTrace, Trace

_RANK_DUMP = re.compile(r"(?:.*_)?rank(\d+)_timestamp([\d.]+?)\.csv")


def read_table(files: Sequence[Path], options: ImportOptions) -> Tokens | CountTrace:
    """The rows of all files: routes of tokens, or counts."""
    read = _Read()
    for done, path in enumerate(files):
        try:
            _read_file(path, done, read)
        except InvalidTraceError as error:
            text = str(error)
            raise InvalidTraceError(
                text if text.startswith(str(path)) else f"{path}: {text}"
            ) from error
        options.progress(done + 1, len(files))
    if read.counts and read.routes:
        raise InvalidTraceError("tables of counts and of routes cannot be mixed")
    if read.counts:
        return _counted(files, read, options)
    if not read.routes:
        raise InvalidTraceError("the recording holds no token")
    if read.others:
        options.note(f"{amount(read.others, 'row')} that held no route: left out")
    routes = Routes.joined(read.routes)
    _check_told(routes, read, options)
    return Tokens(
        blocks=_blocks(routes, options),
        num_experts=_told(read, EXPERT_NAMES) or options.num_experts,
        source="table of routes",
    )


@dataclass(kw_only=True, slots=True)
class _Read:
    """What the files read so far hold."""

    routes: list[Routes] = field(default_factory=list)
    counts: list[NDArray[np.int64]] = field(default_factory=list)
    """[N, 4]: file, layer, expert, count."""
    facts: dict[str, Any] = field(default_factory=dict)
    others: int = 0
    codes: dict[tuple[str, Any], int] = field(default_factory=dict)

    def code(self, kind: str, value: Any) -> int:
        """A number for a name (of a request, a step), by first appearance."""
        try:
            return self.codes.setdefault((kind, value), len(self.codes))
        except TypeError as error:
            raise InvalidTraceError(
                f"{kind} must be a number or text, got {value!r:.40}"
            ) from error


def _read_file(path: Path, number: int, read: _Read) -> None:
    known: dict[tuple[str, ...], Columns] = {}
    for chunk in chunks_of(path):
        read.facts |= chunk.facts
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in chunk.rows:
            groups.setdefault(tuple(row), []).append(row)
        for header, rows in groups.items():
            if header not in known:
                known[header] = columns_of(header)
            columns = known[header]
            if columns.are_counts:
                read.counts.append(_counts_of(rows, columns, number))
            elif columns.are_routes:
                read.routes.append(_routes_of(rows, columns, number, read))
            else:
                read.others += len(rows)
                for row in rows[:4]:
                    read.facts |= row
    if known and not any(c.are_counts or c.are_routes for c in known.values()):
        header, columns = next(iter(known.items()))
        check_routes(columns, header)


def _counts_of(
    rows: list[dict[str, Any]], columns: Columns, number: int
) -> NDArray[np.int64]:
    names = columns.names
    layer = names.get(Column.LAYER)
    return np.array(
        [
            (
                number,
                0 if layer is None else _layer(row[layer], layer),
                integer(row[names[Column.EXPERT]], "expert", high=MAX_EXPERTS),
                integer(row[names[Column.COUNT]], "count", high=1 << 53),
            )
            for row in rows
        ],
        np.int64,
    )


def _routes_of(
    rows: list[dict[str, Any]], columns: Columns, number: int, read: _Read
) -> Routes:
    names = columns.names
    experts = [_experts(row, columns) for row in rows]
    layers = _layers(rows, names.get(Column.LAYER))
    weights = _weights(rows, columns)
    nested = any(isinstance(one[0], list | dict) for one in experts if one)
    if nested and layers is not None:
        raise InvalidTraceError("a route of one layer must be a flat list of experts")
    origin = np.arange(len(rows))
    if nested:
        spread = [(i, layer, ids) for i, one in enumerate(experts)
                  for layer, ids in _by_layer(one)]  # fmt: skip
        origin = np.array([i for i, _, _ in spread], np.int64)
        layers = np.array([layer for _, layer, _ in spread], np.int64)
        experts, weights = [ids for _, _, ids in spread], None
    table = expert_rows(experts)
    return Routes(
        experts=table,
        layers=layers,
        weights=None if weights is None else weight_rows(weights, table.shape[1]),
        single=Column.EXPERT in names,
        file=np.full(len(table), number),
        sequence=_coded(rows, names.get(Column.SEQUENCE), "sequence", read, origin),
        step=_coded(rows, names.get(Column.STEP), "step", read, origin),
        rank=_numbers(rows, names.get(Column.RANK), 1 << 15, origin),
        token=_numbers(rows, names.get(Column.TOKEN), 1 << 31, origin),
        choice=_numbers(rows, names.get(Column.CHOICE), 1 << 15, origin),
        phase=_phases(rows, names.get(Column.PHASE), origin),
        nested=nested,
    )


def _experts(row: dict[str, Any], columns: Columns) -> list[Any]:
    if columns.experts:
        values = [row[name] for name in columns.experts]
        return [integer(v, "expert", -1) if isinstance(v, str) else v for v in values]
    name = columns.names.get(Column.EXPERTS) or columns.names[Column.EXPERT]
    value = row[name]
    if isinstance(value, dict):
        return [value]
    return [] if value is None else listed(value, name)


def _by_layer(one: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Layer and experts of a route that lists all layers."""
    if len(one) == 1 and isinstance(one[0], dict):
        for layer, ids in one[0].items():
            yield _layer(layer, "layer"), listed(ids, "experts")
        return
    for layer, ids in enumerate(one):
        yield layer, listed(ids, "experts")


def _layers(rows: list[dict[str, Any]], name: str | None) -> NDArray[np.int64] | None:
    if name is None:
        return None
    return np.array([_layer(row[name], name) for row in rows], np.int64)


def _layer(value: Any, column: str) -> int:
    """A cell that says a layer, by its number or its name."""
    named = layer_number(value) if isinstance(value, str) else None
    return integer(value if named is None else named, column, high=MAX_LAYER)


def _weights(rows: list[dict[str, Any]], columns: Columns) -> list[list[Any]] | None:
    name = columns.names.get(Column.WEIGHTS)
    if name is not None:
        values = [row[name] for row in rows]
        if any(value is None or isinstance(value, dict) for value in values):
            return None
        return [listed(value, name) for value in values]
    if not columns.weights:
        return None
    return [[listed(row[n], n)[0] for n in columns.weights] for row in rows]


def _coded(
    rows: list[dict[str, Any]],
    name: str | None,
    kind: str,
    read: _Read,
    origin: NDArray[np.int64],
) -> NDArray[np.int64] | None:
    if name is None:
        return None
    return np.array([read.code(kind, row[name]) for row in rows], np.int64)[origin]


def _numbers(
    rows: list[dict[str, Any]], name: str | None, high: int, origin: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """A column of whole numbers; None where it holds anything else (a token's text)."""
    if name is None:
        return None
    try:
        values = [integer(row[name], name, high=high) for row in rows]
    except InvalidTraceError:
        return None
    return np.array(values, np.int64)[origin]


def _phases(
    rows: list[dict[str, Any]], name: str | None, origin: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    if name is None:
        return None
    phases = [is_decode(row[name], name) for row in rows]
    return None if None in phases else np.array(phases, np.int64)[origin]


def _told(read: _Read, names: tuple[str, ...]) -> int | None:
    """A number that a line beside the routes says."""
    for name in names:
        value = read.facts.get(name)
        if type(value) is int and 1 <= value <= MAX_EXPERTS:
            return value
    return None


def _check_told(routes: Routes, read: _Read, options: ImportOptions) -> None:
    """Refuse options that the table contradicts."""
    if options.top_k not in (None, routes.top_k):
        raise InvalidTraceError(
            f"import: `top_k` is {options.top_k}, routes list up to {routes.top_k} "
            f"experts"
        )
    experts = _told(read, EXPERT_NAMES)
    if None not in (experts, options.num_experts) and experts != options.num_experts:
        raise InvalidTraceError(
            f"import: `num_experts` is {options.num_experts}, the table says {experts}"
        )
    if routes.layers is None or routes.nested or options.layers is None:
        return
    layers = np.unique(routes.layers).tolist()
    if layers != list(options.layers):
        raise InvalidTraceError(
            f"import: `layers` is {list(options.layers)[:8]}, the table has "
            f"{layers[:8]}: leave it out"
        )


def _blocks(routes: Routes, options: ImportOptions) -> Iterator[Trace]:
    several = routes.several_files and _disjoint_layers(routes)
    yield from traces_of(routes, options, files_are_layers=several)


def _disjoint_layers(routes: Routes) -> bool:
    """Whether each file has layers of its own: then files are no sequences."""
    if routes.layers is None:
        return False
    sets = [
        set(np.unique(routes.layers[routes.file == file]).tolist())
        for file in np.unique(routes.file)
    ]
    return all(not one & other for one, other in combinations(sets, 2))


def _counted(files: Sequence[Path], read: _Read, options: ImportOptions) -> CountTrace:
    """Counts by file; dumps of all ranks at one time are one group."""
    rows = np.concatenate(read.counts)
    rows = rows[rows[:, 3] > 0]
    if not len(rows):
        raise InvalidTraceError("the recording counted nothing")
    groups = _groups(files)
    layers, at = np.unique(rows[:, 1], return_inverse=True)
    num_experts = options.num_experts or int(rows[:, 2].max()) + 1
    if rows[:, 2].max() >= num_experts:
        raise InvalidTraceError(
            f"expert id {rows[:, 2].max()} is outside 0..{num_experts - 1}"
        )
    if options.num_experts is None:
        options.note(
            f"the recording does not say how many experts there are: {num_experts}, "
            f"the largest id plus one; `num_experts` says otherwise"
        )
    if float(rows[:, 3].sum(dtype=np.float64)) > 2**53:
        raise InvalidTraceError("counts must add up to at most 2**53")
    counts = np.zeros((int(groups.max()) + 1, len(layers), num_experts), np.int64)
    np.add.at(counts, (groups[rows[:, 0]], at, rows[:, 2]), rows[:, 3])
    if options.layers is not None and list(options.layers) != layers.tolist():
        raise InvalidTraceError(
            f"import: `layers` is {list(options.layers)[:8]}, the table has "
            f"{layers.tolist()[:8]}: leave it out"
        )
    return count_trace(
        counts,
        "table of counts",
        options,
        layers.astype(np.int32),
        _told(read, TOP_K_NAMES),
    )


def _groups(files: Sequence[Path]) -> NDArray[np.int64]:
    """The group of each file: the n-th dump of every rank is one."""
    names = [_RANK_DUMP.fullmatch(path.name) for path in files]
    if not all(names):
        return np.arange(len(files))
    order = sorted(
        (int(name[1]), float(name[2].rstrip(".")), index)
        for index, name in enumerate(names)
        if name is not None
    )
    groups = np.zeros(len(files), np.int64)
    seen: dict[int, int] = {}
    for rank, _, index in order:
        groups[index] = seen.get(rank, 0)
        seen[rank] = seen.get(rank, 0) + 1
    return groups
