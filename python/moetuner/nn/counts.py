"""What the exchanges of a model counted and saw, as values and files.

Legend: L layers, G ranks, N nodes, P slots, T tokens, K top-k.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from moetuner.errors import InvalidTraceError
from moetuner.evaluation.verify import ExchangeRecord
from moetuner.ops._collectives import group_named
from moetuner.placement.tables import fingerprint
from moetuner.trace import Trace, TraceMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moetuner.nn.exchange import Exchange
    from moetuner.placement.model import Placement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExchangeCounts:
    """Traffic of one layer from the tokens of one rank, since the counters began."""

    rank: int
    tokens: int
    """Tokens that the layer saw here."""
    rows_to_rank: NDArray[np.int64]
    """[G], the own rank too: a token's row travels once to each of its ranks."""
    rows_to_node: NDArray[np.int64]
    """[N], the own node too."""
    slot_choices: NDArray[np.int64]
    """[P], (token, expert) pairs by the slot that computed them."""
    row_bytes: int
    """Of one row, in the dtype that was last seen."""

    @classmethod
    def of(
        cls,
        counters: NDArray[np.int64],
        placement: Placement,
        row_bytes: int,
        rank: int = 0,
    ) -> ExchangeCounts:
        """Take the counters of `moetuner.ops.dispatch` apart."""
        topology = placement.topology
        ends = np.cumsum([1, topology.num_ranks, topology.num_nodes])
        tokens, ranks, nodes, slots = np.split(counters, ends)
        return cls(
            rank=rank,
            tokens=int(tokens[0]),
            rows_to_rank=ranks,
            rows_to_node=nodes,
            slot_choices=slots,
            row_bytes=row_bytes,
        )

    @property
    def remote_rows(self) -> int:
        """Rows that left this rank; as many sums come back."""
        return int(self.rows_to_rank.sum() - self.rows_to_rank[self.rank])

    @property
    def remote_bytes(self) -> int:
        """Bytes of those rows, one way; 8 K more travel with each."""
        return self.remote_rows * self.row_bytes

    @property
    def ranks_per_token(self) -> float:
        """Mean number of distinct ranks that a token visits."""
        return float(self.rows_to_rank.sum() / max(self.tokens, 1))

    @property
    def nodes_per_token(self) -> float:
        """Mean number of distinct nodes that a token visits."""
        return float(self.rows_to_node.sum() / max(self.tokens, 1))

    @property
    def rank_load(self) -> NDArray[np.int64]:
        """[G] (token, expert) pairs that this rank's tokens brought to each rank."""
        load: NDArray[np.int64] = self.slot_choices.reshape(
            len(self.rows_to_rank), -1
        ).sum(axis=1)
        return load


def exchanges_of(model: torch.nn.Module) -> list[Exchange]:
    """The exchanges of a model in the order of their layers.

    Raises
    ------
    InvalidTraceError
        When it has none, or two of one layer.
    """
    from moetuner.nn.exchange import ATTRIBUTE, Exchange

    found: list[Exchange] = []
    for module in model.modules():
        candidate = vars(module).get(ATTRIBUTE, module)
        if isinstance(candidate, Exchange):
            found.append(candidate)
    found.sort(key=lambda exchange: exchange.layer)
    layers = [exchange.layer for exchange in found]
    if not found or len(set(layers)) < len(layers):
        raise InvalidTraceError(
            f"{type(model).__name__} must have exchanges of distinct layers, got "
            f"layers {layers}: give each MoELayer its layer="
        )
    return found


def gather_counts(model: torch.nn.Module) -> ExchangeRecord:
    """What all ranks counted; **every rank of the group calls this**, all get it."""
    exchanges = exchanges_of(model)
    group = group_named(exchanges[0].group_name)
    mine = torch.stack([exchange.counters for exchange in exchanges])
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    return ExchangeRecord(
        counts=torch.stack(every, dim=1).cpu().numpy(),
        layer_ids=np.array([exchange.layer for exchange in exchanges], np.int32),
        placement_fingerprint=fingerprint(exchanges[0].placement),
    )


class RunRecording:
    """Ids that the exchanges of a model saw, row by row, padding too."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        self._exchanges = exchanges
        self._routing: list[list[torch.Tensor]] = [[] for _ in exchanges]

    def trace(self) -> Trace:
        """The run on all ranks; **every rank of the group calls this**, all get it.

        ``home_rank`` is the rank that saw a token, ``sequence`` one call on one rank,
        ``position`` the row there: what `moetuner.evaluation.verify.verify` takes.

        Raises
        ------
        InvalidTraceError
            On every rank: when nothing ran, or layers of any rank saw different tokens.
        """
        group = group_named(self._exchanges[0].group_name)
        every: list[tuple[str, list[NDArray[np.int16]]]]
        every = [("", [])] * group.size()
        trouble = self._trouble()
        mine = (trouble, [] if trouble else self._steps())
        dist.all_gather_object(every, mine, group=group)
        for rank, (trouble, _) in enumerate(every):
            if trouble:
                raise InvalidTraceError(f"record_run: rank {rank}: {trouble}")
        if not any(steps for _, steps in every):
            raise InvalidTraceError("record_run: no layer ran")
        ids, step, row, home = [], [], [], []
        for rank, (_, steps) in enumerate(every):
            for number, one in enumerate(steps):
                ids.append(one)
                step.append(np.full(len(one), number * group.size() + rank))
                row.append(np.arange(len(one)))
                home.append(np.full(len(one), rank))
        return Trace(
            topk_ids=np.ascontiguousarray(np.concatenate(ids)),
            num_experts=self._exchanges[0].placement.num_experts,
            layer_ids=np.array([e.layer for e in self._exchanges], np.int32),
            sequence=np.concatenate(step).astype(np.int32),
            position=np.concatenate(row).astype(np.int32),
            home_rank=np.concatenate(home).astype(np.int16),
            metadata=TraceMetadata(source="moetuner.nn.record_run"),
        )

    def _trouble(self) -> str:
        """Why this rank's ids make no trace; empty when they do."""
        sizes = [[ids.shape for ids in layer] for layer in self._routing]
        if all(size == sizes[0] for size in sizes):
            return ""
        return "layers saw different tokens; record where all layers see the same"

    def _steps(self) -> list[NDArray[np.int16]]:
        """[T, L, K] of each call on this rank."""
        experts = self._exchanges[0].placement.num_experts
        steps = []
        for call in zip(*self._routing, strict=True):
            ids = torch.stack(call, dim=1).cpu().numpy()
            ids[(ids < 0) | (ids >= experts)] = -1  # padding
            steps.append(ids.astype(np.int16))
        return steps


@contextmanager
def record_run(model: torch.nn.Module) -> Iterator[RunRecording]:
    """Keep the ids that every exchange of `model` sees while the context lasts.

    Counters are set to zero at its beginning, so that afterwards they and the trace
    tell of the same tokens. Ids stay on the device, 4 bytes per choice.
    """
    exchanges = exchanges_of(model)
    recording = RunRecording(exchanges)
    for exchange, ids in zip(exchanges, recording._routing, strict=True):
        exchange.reset()
        exchange.routing = ids
    try:
        yield recording
    finally:
        for exchange in exchanges:
            exchange.routing = None
