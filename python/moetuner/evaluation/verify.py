"""Counted traffic against predicted traffic: they must be equal.

The exchange of a layer adds to counters while the model runs (`ExchangeRecord`); the
evaluator predicts them from the ids of the same tokens. Legend: L layers, G ranks, N
nodes, R ranks of a node, P slots, C = 1 + G + N + P columns (and R more where rows took
two levels), T tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moetuner._checks import is_array, kind_of
from moetuner._files import atomic_write_bytes
from moetuner._words import amount
from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.tally import check_same_model, tally
from moetuner.placement.tables import PlacementTables, fingerprint
from moetuner.trace import Trace

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology

FORMAT = "moetuner.counters"
VERSION = "1"
MAX_ROWS = 2**16
"""Rows, padding too, that are predicted at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExchangeRecord:
    """What the exchange of every layer counted on every rank.

    Parameters
    ----------
    counts
        int64 [L, G, C]: tokens; rows to each rank; rows to each node; choices of each
        slot, from the tokens of rank g; and, where rows took two levels, those that
        rank g passed on to each rank of its node.
    layer_ids
        int32 [L], the model's own layer numbers.
    placement_fingerprint
        Of the placement that was used, `moetuner.placement.tables.fingerprint`.

    Raises
    ------
    InvalidTraceError
        When the arrays do not fit together.
    """

    counts: NDArray[np.int64]
    layer_ids: NDArray[np.int32]
    placement_fingerprint: str

    def __post_init__(self) -> None:
        counts, layers = self.counts, self.layer_ids
        if not is_array(counts, np.int64, 3):
            raise InvalidTraceError(
                f"ExchangeRecord: counts must be int64 [layers, ranks, columns], got "
                f"{kind_of(counts)}"
            )
        if not is_array(layers, np.int32, 1) or len(layers) != len(counts):
            raise InvalidTraceError(
                f"ExchangeRecord: layer_ids must be int32 [{len(counts)}], got "
                f"{kind_of(layers)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One number that was not counted as predicted."""

    layer: int
    rank: int
    what: str
    predicted: int
    counted: int

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, rank {self.rank}: {self.what}: predicted "
            f"{self.predicted}, counted {self.counted}"
        )


def write_record(record: ExchangeRecord, path: str | os.PathLike[str]) -> None:
    """Write as safetensors; an existing file is replaced whole."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "placement": record.placement_fingerprint,
    }
    tensors: dict[str, NDArray[Any]] = {
        "counts": np.ascontiguousarray(record.counts),
        "layer_ids": np.ascontiguousarray(record.layer_ids),
    }
    atomic_write_bytes(path, save(tensors, metadata=header))


def read_record(path: str | os.PathLike[str]) -> ExchangeRecord:
    """Read what `write_record` wrote.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    InvalidTraceError
        When it is something else, damaged, or of another version.
    """
    data = Path(path).read_bytes()
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise InvalidTraceError(f"{path}: not a counters file: {error}") from error
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise InvalidTraceError(
            f"{path}: not a counters file: its format is {header.get('format')!r} "
            f"version {header.get('version')!r}, wanted {FORMAT!r} version {VERSION!r}"
        )
    if set(tensors) != {"counts", "layer_ids"}:
        raise InvalidTraceError(
            f"{path}: wanted tensors counts and layer_ids, got {sorted(tensors)}"
        )
    return ExchangeRecord(placement_fingerprint=header.get("placement", ""), **tensors)


def predict(
    trace: Trace, placement: Placement, *, two_levels: bool = False
) -> NDArray[np.int64]:
    """What the counters must say, int64 [L, G, C], by the evaluator.

    Parameters
    ----------
    trace
        A run as `moetuner.nn.record_run` keeps it: ``home_rank`` is the rank whose
        layer saw the token, ``sequence`` one step of one rank, ``position`` the row.
    placement
        Of the run.
    two_levels
        Whether rows crossed between nodes by a hop of their own.

    Raises
    ------
    InvalidTraceError
        When the trace does not say these.
    InvalidPlacementError
        When it is for another model.
    """
    check_same_model(trace, placement)
    if trace.home_rank is None or trace.sequence is None or trace.position is None:
        raise InvalidTraceError(
            "verify: the trace must say home_rank, sequence (the step) and position "
            "(the row) of each token: record the run with moetuner.nn.record_run"
        )
    num_ranks = placement.topology.num_ranks
    if trace.num_tokens and trace.home_rank.max() >= num_ranks:
        raise InvalidTraceError(
            f"verify: home_rank {trace.home_rank.max()} in the trace, but the "
            f"placement has {amount(num_ranks, 'rank')}"
        )
    predicted = np.stack(
        [_predict_rank(trace, placement, rank) for rank in range(num_ranks)], axis=1
    )
    if two_levels:
        traffic = predicted[..., 1 : 1 + num_ranks]
        passed_on = _passed_on(traffic, placement.topology)
        predicted = np.concatenate([predicted, passed_on], axis=-1)
    return predicted


def verify(
    trace: Trace, placement: Placement, record: ExchangeRecord
) -> list[Difference]:
    """Every number that was not counted as predicted; empty: all are equal.

    Raises
    ------
    InvalidTraceError, InvalidPlacementError
        When the three do not belong together.
    """
    if record.placement_fingerprint != fingerprint(placement):
        raise InvalidPlacementError(
            f"verify: the counters are of another placement (fingerprint "
            f"{record.placement_fingerprint[:12]}, this one has "
            f"{fingerprint(placement)[:12]})"
        )
    topology = placement.topology
    columns = len(column_names(topology, placement.num_slots))
    two_levels = record.counts.shape[2] == columns + topology.ranks_per_node
    predicted = predict(trace, placement, two_levels=two_levels)
    same_layers = np.array_equal(record.layer_ids, placement.layer_ids)
    if not same_layers or record.counts.shape != predicted.shape:
        raise InvalidTraceError(
            f"verify: counters {list(record.counts.shape)} of layers "
            f"{record.layer_ids.tolist()} do not fit the placement: wanted "
            f"{list(predicted.shape)} and {placement.layer_ids.tolist()}"
        )
    names = column_names(topology, placement.num_slots, two_levels=two_levels)
    return [
        Difference(
            layer=int(placement.layer_ids[layer]),
            rank=int(rank),
            what=names[column],
            predicted=int(predicted[layer, rank, column]),
            counted=int(record.counts[layer, rank, column]),
        )
        for layer, rank, column in np.argwhere(predicted != record.counts)
    ]


def column_names(
    topology: Topology, num_slots: int, *, two_levels: bool = False
) -> list[str]:
    """What each of the C columns counts."""
    in_node = topology.ranks_per_node if two_levels else 0
    return [
        "tokens",
        *(f"rows to rank {rank}" for rank in range(topology.num_ranks)),
        *(f"rows to node {node}" for node in range(topology.num_nodes)),
        *(f"choices of slot {slot}" for slot in range(num_slots)),
        *(f"rows passed on to rank {rank} of its node" for rank in range(in_node)),
    ]


def _passed_on(traffic: NDArray[np.int64], topology: Topology) -> NDArray[np.int64]:
    """[L, G, R] by traffic [L, G, G]: a rank passes on rows of ranks of its place."""
    nodes, in_node = topology.num_nodes, topology.ranks_per_node
    shape = (len(traffic), nodes, in_node, nodes, in_node)
    by_place = traffic.reshape(shape).sum(axis=1)  # [L, place of home, node, R]
    passed_on: NDArray[np.int64] = by_place.transpose(0, 2, 1, 3)
    return passed_on.reshape(len(traffic), topology.num_ranks, in_node)


def _predict_rank(trace: Trace, placement: Placement, rank: int) -> NDArray[np.int64]:
    """[L, C] of the tokens of one rank."""
    num_tokens = np.full((trace.num_layers, 1), _count_of(trace, rank))
    turn = _turn_length(placement, rank)
    parts = [_rows_of(i, trace, placement, rank) for i in _by_row(trace, rank, turn)]
    width = placement.topology.num_ranks + placement.topology.num_nodes
    zeros = np.zeros((trace.num_layers, width + placement.num_slots), np.int64)
    predicted: NDArray[np.int64] = np.hstack([num_tokens, sum(parts, zeros)])
    return predicted


def _rows_of(
    ids: NDArray[np.int16], trace: Trace, placement: Placement, rank: int
) -> NDArray[np.int64]:
    """[L, C - 1] of tokens of one rank, whose index says whose turn it is."""
    topology = placement.topology
    own = Trace(
        topk_ids=ids,
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        home_rank=np.full(len(ids), rank, np.int16),
    )
    told = tally(own, placement, homes=Homes.RECORDED)
    node = rank // topology.ranks_per_node
    to_node = told.node_ingress[0]  # [L, N] of the other nodes
    own_node = told.distinct_nodes[0] - to_node.sum(axis=1)
    to_node[:, node] += own_node
    parts = [told.traffic[:, rank], to_node, told.slot_rows[0]]
    rows: NDArray[np.int64] = np.rint(np.concatenate(parts, axis=1)).astype(np.int64)
    return rows


def _count_of(trace: Trace, rank: int) -> int:
    assert trace.home_rank is not None
    return int((trace.home_rank == rank).sum())


def _turn_length(placement: Placement, rank: int) -> int:
    """Rows after which every expert's turn among its replicas begins again."""
    turns = np.unique(PlacementTables.of(placement, rank).num_candidates)
    return math.lcm(*turns.tolist())


def _by_row(trace: Trace, rank: int, turn: int) -> Iterator[NDArray[np.int16]]:
    """Ids [T', L, K] of a rank's steps, one behind the other, in the order of rows.

    The evaluator takes turns among replicas by a token's index, the exchange by its row
    in the step: each step is padded to whole turns, so that both are the same. Turns
    can be long, so not more steps come at once than `MAX_ROWS` hold; a step that comes
    alone needs no padding.
    """
    assert trace.sequence is not None
    assert trace.position is not None
    mine = trace.home_rank == rank
    step, row = trace.sequence[mine], trace.position[mine].astype(np.int64)
    _, index, length = np.unique(step, return_inverse=True, return_counts=True)
    turn = min(turn, MAX_ROWS)
    room = -(-length // turn) * turn
    start = np.cumsum(room) - room
    if (row >= length[index]).any() or len(np.unique(start[index] + row)) != len(row):
        raise InvalidTraceError(
            f"verify: the rows of a step of rank {rank} must be 0, 1, ... in position"
        )
    ids, place = trace.topk_ids[mine], start[index] + row
    order = place.argsort()
    batch = (start // MAX_ROWS)[index[order]]
    for tokens in np.split(order, np.flatnonzero(np.diff(batch)) + 1):
        if len(tokens):
            at = place[tokens] - start[index[tokens[0]]]
            told = np.full((int(at[-1]) + 1, *ids.shape[1:]), -1, np.int16)
            told[at] = ids[tokens]
            yield told
