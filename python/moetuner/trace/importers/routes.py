"""Rows of a table, put together to tokens.

A token is what has the same file, step, sequence, rank and place; a row that comes
again for a token and layer is the next pass in which the logger counted from 0. Without
a column that numbers tokens, the n-th row of each layer is the n-th token.

Legend: N rows, T tokens, L layers, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount, verb
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import block_rows
from moetuner.trace.importers.rows import TokenRows
from moetuner.trace.model import MAX_EXPERTS, PADDING, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions

    Integers = NDArray[np.int64]

_OPTIONAL = ("layers", "sequence", "step", "rank", "token", "choice", "phase")
_MAX_GAPS = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routes:
    """Rows of a table; every array has one value a row.

    Parameters
    ----------
    experts
        int16 [N, K], padded with -1.
    file
        int64 [N], which file a row is of.
    layers, sequence, step, rank, token, choice, phase
        int64 [N], or None where no column says so.
    weights
        float32 [N, K], or None.
    single
        Whether a row is one choice of a token, and not all of a layer.
    nested
        Whether rows were lists of all layers, which have no numbers of their own.
    """

    experts: NDArray[np.int16]
    file: Integers
    layers: Integers | None = None
    sequence: Integers | None = None
    step: Integers | None = None
    rank: Integers | None = None
    token: Integers | None = None
    choice: Integers | None = None
    phase: Integers | None = None
    weights: NDArray[np.float32] | None = None
    single: bool = False
    nested: bool = False

    @property
    def top_k(self) -> int:
        """Experts of the longest row."""
        return int(self.experts.shape[1])

    @property
    def several_files(self) -> bool:
        """Whether rows came from more than one file."""
        return bool(len(self.file) and self.file.max() > self.file.min())

    @staticmethod
    def joined(parts: Sequence[Routes]) -> Routes:
        """All rows; a column survives when every part has it."""
        first, width = parts[0], max(part.top_k for part in parts)
        if len({part.single for part in parts}) > 1:
            raise InvalidTraceError("rows of one choice and of whole routes are mixed")
        if len({part.layers is None for part in parts}) > 1:
            raise InvalidTraceError("some rows name their layer and others do not")

        def wide(table: NDArray[Any], fill: float) -> NDArray[Any]:
            padded = np.full((len(table), width), fill, table.dtype)
            padded[:, : table.shape[1]] = table
            return padded

        columns: dict[str, Any] = {}
        for name in _OPTIONAL:
            values = [getattr(part, name) for part in parts]
            missing = any(value is None for value in values)
            columns[name] = None if missing else np.concatenate(values)
        weights = [part.weights for part in parts]
        return Routes(
            experts=np.concatenate([wide(part.experts, PADDING) for part in parts]),
            file=np.concatenate([part.file for part in parts]),
            weights=(
                None
                if any(w is None for w in weights)
                else np.concatenate([wide(w, 0) for w in weights if w is not None])
            ),
            single=first.single,
            nested=any(part.nested for part in parts),
            **columns,
        )


def traces_of(
    routes: Routes, options: ImportOptions, *, files_are_layers: bool
) -> Iterator[Trace]:
    """The tokens in blocks, sequence by sequence.

    Raises
    ------
    InvalidTraceError
        When rows cannot be put together to tokens.
    """
    if routes.single:
        routes = _choices_together(routes, files_are_layers)
    layer_of = np.zeros(len(routes.file), np.int64)
    layer_of = layer_of if routes.layers is None else routes.layers
    layers, row = np.unique(layer_of, return_inverse=True)
    key = _key(routes, files_are_layers)
    again = _occurrence(key, row)
    sequences = _sequence_columns(routes, files_are_layers)
    # Passes of a logger that counts from 0 follow one another.
    order = (key, again) if routes.token is None else (again, key)
    token = _ranked((*sequences, *order))
    if not sequences and routes.token is not None and again.any():
        sequences = (again,)  # a pass that began to count anew
    num_tokens = int(token.max()) + 1
    if num_tokens * len(layers) > _MAX_GAPS * len(row) + 4096:
        raise InvalidTraceError(
            f"{amount(len(row), 'row')} for {amount(num_tokens, 'token')} of "
            f"{amount(len(layers), 'layer')}: rows of "
            f"different layers are of different tokens"
        )
    gaps = num_tokens * len(layers) - len(row)
    if gaps:
        options.note(
            f"{amount(gaps, 'route')} of {amount(num_tokens, 'token')} "
            f"{verb(gaps, 'is', 'are')} missing: padding there"
        )
    first = np.zeros(num_tokens, np.int64)
    first[token[::-1]] = np.arange(len(token))[::-1]
    sequence = _ranked(tuple(c[first] for c in sequences)) if sequences else None
    position = _positions(routes, sequence, first, again)
    yield from _traces(routes, options, layers, row, token, first, sequence, position)


def _key(routes: Routes, files_are_layers: bool) -> Integers:
    """What tells tokens apart, besides how often a row came: int64 [N]."""
    columns = [routes.sequence, routes.step, routes.rank, routes.token]
    if not files_are_layers:
        columns.append(routes.file)
    return _ranked(tuple(c for c in columns if c is not None) or (0 * routes.file,))


def _sequence_columns(routes: Routes, files_are_layers: bool) -> tuple[Integers, ...]:
    """What tells sequences apart; empty when nothing does."""
    columns = [] if files_are_layers or not routes.several_files else [routes.file]
    if routes.sequence is not None:
        return (*columns, routes.sequence)
    if routes.step is not None:
        columns.append(routes.step)
        if routes.rank is not None:
            columns.append(routes.rank)
    return tuple(columns)


def _ranked(columns: tuple[Integers, ...]) -> Integers:
    """Dense numbers 0.. of the rows' values, in lexicographic order."""
    order = np.lexsort(columns[::-1])
    new = np.zeros(len(order), bool)
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    ranked = np.empty(len(order), np.int64)
    ranked[order] = np.cumsum(new)
    return ranked


def _occurrence(key: Integers, row: Integers) -> Integers:
    """How often the same key and layer came before, int64 [N]."""
    group = _ranked((key, row))
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    before = np.empty(len(group), np.int64)
    before[order] = np.arange(len(group)) - starts[group[order]]
    return before


def _choices_together(routes: Routes, files_are_layers: bool) -> Routes:
    """Rows of one choice each as rows of all choices of a token and layer."""
    if routes.token is None:
        raise InvalidTraceError(
            "rows of one expert each need a column that numbers tokens (token_idx, "
            "position) to be put together"
        )
    key = _key(routes, files_are_layers)
    layer = key * 0 if routes.layers is None else routes.layers
    group = _ranked((key, layer))
    choice = np.arange(len(group)) if routes.choice is None else routes.choice
    order = np.lexsort((choice, group))
    sizes = np.bincount(group)
    width = int(sizes.max())
    if width > MAX_EXPERTS or width * len(sizes) > _MAX_GAPS * len(group) + 4096:
        raise InvalidTraceError(
            f"tokens have {sizes.min()} to {width} rows of one expert each: numbers of "
            f"tokens are used again without a column that tells passes apart"
        )
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(group)) - starts[group[order]]
    experts = np.full((len(sizes), width), PADDING, np.int16)
    experts[group[order], place] = routes.experts[order, 0]
    weights = None
    if routes.weights is not None:
        weights = np.zeros(experts.shape, np.float32)
        weights[group[order], place] = routes.weights[order, 0]
    head = order[starts]
    columns: dict[str, Any] = {
        name: None if (v := getattr(routes, name)) is None else v[head]
        for name in _OPTIONAL
    }
    return Routes(experts=experts, file=routes.file[head], weights=weights, **columns)


def _traces(
    routes: Routes,
    options: ImportOptions,
    layers: Integers,
    row: Integers,
    token: Integers,
    first: Integers,
    sequence: Integers | None,
    position: Integers | None,
) -> Iterator[Trace]:
    """Blocks of tokens; `first` is a row of each token."""
    named = None if routes.nested or routes.layers is None else layers.astype(np.int32)
    rows = TokenRows(options, named)
    order = np.argsort(token, kind="stable")
    ends = np.cumsum(np.bincount(token))
    size = block_rows(len(layers), routes.top_k)
    for start in range(0, len(first), size):
        stop = min(start + size, len(first))
        mine = order[ends[start - 1] if start else 0 : ends[stop - 1]]
        shape = (stop - start, len(layers), routes.top_k)
        ids = np.full(shape, PADDING, np.int16)
        ids[token[mine] - start, row[mine]] = routes.experts[mine]
        weights = None
        if routes.weights is not None:
            weights = np.zeros(shape, np.float32)
            weights[token[mine] - start, row[mine]] = routes.weights[mine]
        if weights is not None:
            strongest = np.argsort(-weights, axis=2, kind="stable")
            ids = np.take_along_axis(ids, strongest, axis=2)
            weights = np.take_along_axis(weights, strongest, axis=2)
        kept, routed = rows.routed(ids)
        at = first[start + kept]
        yield Trace(
            topk_ids=routed,
            num_experts=options.num_experts or MAX_EXPERTS,
            layer_ids=rows.layer_ids,
            topk_weights=None if weights is None else weights[kept][:, rows.rows],
            sequence=_int32(None if sequence is None else sequence[start + kept]),
            position=_int32(None if position is None else position[start + kept]),
            home_rank=_of(routes.rank, at, np.int16),
            phase=_of(routes.phase, at, np.uint8),
            ranked=weights is not None,
        )


def _positions(
    routes: Routes,
    sequence: Integers | None,
    first: Integers,
    again: Integers,
) -> Integers | None:
    """Place of each token in its sequence."""
    if sequence is None:
        return None if routes.token is None else routes.token[first]
    if routes.token is not None and not again.any() and routes.step is None:
        return routes.token[first]
    return _occurrence(sequence, 0 * sequence)


def _of(
    column: Integers | None, at: Integers, dtype: type[np.integer[Any]]
) -> NDArray[Any] | None:
    return None if column is None else column[at].astype(dtype)


def _int32(column: Integers | None) -> NDArray[np.int32] | None:
    return None if column is None else column.astype(np.int32)
