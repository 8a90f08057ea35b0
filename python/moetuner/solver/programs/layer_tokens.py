"""What the tokens of one layer ask for, in all batches of a workload, to be counted.

Legend: T tokens, K top-k, B batches, E experts, G ranks, N nodes of m ranks; H homes
that are told apart: all G where they are recorded, 1 where any rank is as likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._core import Crossing, Rows
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.workload import num_batches
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerTokens:
    """Rows that travel at one layer; with a row per expert, each is one of its own.

    ``ids`` int64 [T, K] (-1: none), ``batch`` and ``home`` int64 [T]; ``weight``
    float64 [B] of each batch in the objective, ``rows`` float64 [B, E] computed for
    each expert. ``rank_out`` [H, G] and ``node_out`` [H, N] are the share of rows from
    a home that reach their rank (node) through a rank of its node (another node).
    """

    ids: NDArray[np.int64]
    batch: NDArray[np.int64]
    home: NDArray[np.int64]
    weight: Floats
    rows: Floats
    rank_out: Floats
    node_out: Floats

    @classmethod
    def of(cls, problem: PlacementProblem, layer: int) -> LayerTokens:
        """The tokens of all traces, each batch with the weight that it has."""
        workload = problem.workload
        ids, batch, homes, weight, offset = [], [], [], [], 0
        top_k = max(trace.topk_ids.shape[2] for trace in _traces(problem))
        for trace, batches, share in zip(
            _traces(problem), workload.batches, workload.weights, strict=True
        ):
            chosen = np.full((trace.num_tokens, top_k), -1, np.int64)
            chosen[:, : trace.topk_ids.shape[2]] = trace.topk_ids[:, layer]
            count = num_batches(batches)
            ids.append(np.where(chosen < problem.num_experts, chosen, -1))
            batch.append(batches.astype(np.int64) + offset)
            weight += [share / count] * count
            offset += count
            if trace.home_rank is not None:
                homes.append(trace.home_rank.astype(np.int64))
        recorded = workload.cost.homes is Homes.RECORDED
        all_ids, all_batch = np.concatenate(ids), np.concatenate(batch)
        home = np.concatenate(homes) if recorded else np.zeros_like(all_batch)
        token, place = np.nonzero(all_ids >= 0)
        cell = all_batch[token] * problem.num_experts + all_ids[token, place]
        rows = np.bincount(cell, minlength=offset * problem.num_experts)
        if workload.cost.wire.rules.rows is Rows.PER_EXPERT:
            all_ids = all_ids[token, place][:, None]
            all_batch, home = all_batch[token], home[token]
        rank_out, node_out = _ways_out(problem, recorded)
        return cls(
            ids=all_ids,
            batch=all_batch,
            home=home,
            weight=np.array(weight),
            rows=rows.reshape(offset, -1).astype(np.float64),
            rank_out=rank_out,
            node_out=node_out,
        )

    def count(
        self, token: NDArray[Any], key: NDArray[Any], num_keys: int
    ) -> NDArray[np.float64]:
        """How many of ``token`` there are by batch, key and home, [B, keys, H]."""
        width = len(self.rank_out)
        cell = (self.batch[token] * num_keys + key) * width + self.home[token]
        size = self.weight.size * num_keys * width
        counted = np.bincount(cell, minlength=size)
        return counted.reshape(self.weight.size, num_keys, width).astype(np.float64)

    def masks(self) -> NDArray[np.int64]:
        """Which experts each row's token chose, as bits, int64 [T]; at most 62."""
        bits = np.where(self.ids >= 0, np.int64(1) << np.maximum(self.ids, 0), 0)
        found: NDArray[np.int64] = np.bitwise_or.reduce(bits, axis=1)
        return found


def _traces(problem: PlacementProblem) -> list[Trace]:
    return [trace for trace in problem.workload.traces if isinstance(trace, Trace)]


def _ways_out(problem: PlacementProblem, recorded: bool) -> tuple[Floats, Floats]:
    """``rank_out`` [H, G] and ``node_out`` [H, N].

    Rows enter a node at the gateway, the rank with their home's place in its own node;
    where rows cross directly there is none, and a home sends to its own node alone.
    """
    topology, workload = problem.topology, problem.workload
    ranks, per_node = np.arange(topology.num_ranks), topology.ranks_per_node
    if workload.cost.wire.rules.crossing is Crossing.DIRECT:
        by_rank = np.eye(topology.num_ranks)
    else:
        by_rank = (ranks[:, None] % per_node == ranks % per_node) * 1.0
    by_node = np.eye(topology.num_nodes)[topology.nodes()]
    if recorded:
        return by_rank, by_node
    return by_rank.mean(axis=0)[None], by_node.mean(axis=0)[None]
