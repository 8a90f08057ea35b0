"""What the evaluator says of the very tokens of a run: rows, and seconds.

Legend: L layers, G ranks, N nodes, C columns of counters, Q steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import beside  # noqa: F401
import numpy as np
from moetuner import Homes
from moetuner.evaluation.tally import tally
from moetuner.evaluation.verify import predict
from moetuner.evaluation.workload import price
from variants import ALL_GATHER, FOLLOW, OURS, WIRES, Variant

if TYPE_CHECKING:
    from case import Case
    from moetuner import Placement, Topology
    from moetuner.trace import Trace
    from numpy.typing import NDArray


def traffic(
    variant: Variant, placement: Placement, trace: Trace
) -> NDArray[np.float64]:
    """Rows from rank to rank on the way out, [L, G, G]; to the own rank too."""
    num_ranks = placement.topology.num_ranks
    if variant.exchange == OURS:
        return predict(trace, placement)[..., 1 : 1 + num_ranks]
    if variant.exchange == FOLLOW:
        follow = tally(trace, placement, homes=Homes.FOLLOW).traffic
        home = tally(trace, placement, homes=Homes.RECORDED).traffic
        return np.concatenate([home[:1], follow[1:]])
    if variant.exchange == ALL_GATHER:
        here = np.bincount(trace.home_rank, minlength=num_ranks)
        return np.broadcast_to(
            here[:, None], (trace.num_layers, num_ranks, num_ranks)
        ).astype(np.float64)
    choices = predict(trace, placement)[..., -placement.num_slots :]
    return choices.reshape(*choices.shape[:2], num_ranks, -1).sum(axis=-1)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows on the way out, all layers and ranks together."""

    out_of_ranks: int
    """To another rank, of this node or another."""
    out_of_nodes: int


def rows(
    variant: Variant, topology: Topology, counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Rows]:
    """Counters [L, G, C] as traffic [L, G, G], and what left ranks and nodes.

    On two levels a row crosses once to each node, and is passed on there.
    """
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    to_rank = counts[..., 1 : 1 + num_ranks]
    total = to_rank.sum(axis=0)
    elsewhere = ~topology.same_node()
    out_of_ranks = int(total.sum() - np.trace(total))
    out_of_nodes = int(total[elsewhere].sum())
    if variant.exchange in (OURS, FOLLOW) and two_levels(topology):
        to_node = counts[..., 1 + num_ranks : 1 + num_ranks + num_nodes].sum(axis=0)
        own = to_node[np.arange(num_ranks), topology.nodes()]
        out_of_nodes = int(to_node.sum() - own.sum())
        passed = counts[..., -topology.ranks_per_node :].sum(axis=0)
        place = np.arange(num_ranks) % topology.ranks_per_node
        stayed = passed[np.arange(num_ranks), place]
        out_of_ranks = out_of_nodes + int(passed.sum() - stayed.sum())
    return to_rank, Rows(out_of_ranks=out_of_ranks, out_of_nodes=out_of_nodes)


def two_levels(topology: Topology) -> bool:
    """Whether our exchange takes two."""
    return 1 < topology.ranks_per_node < topology.num_ranks


@dataclass(frozen=True, kw_only=True)
class Said:
    """Modelled milliseconds of the experts and their exchanges, mean over steps."""

    step: float
    experts: float
    exchange: float


def seconds(
    case: Case, variant: Variant, placement: Placement, trace: Trace
) -> Said | None:
    """Of the steps of a trace; None where the wire is none that is priced."""
    homes = Homes.FOLLOW if variant.exchange == FOLLOW else Homes.RECORDED
    cost = replace(case.cost, wire=WIRES[variant.exchange], homes=homes)
    step = trace.sequence // placement.topology.num_ranks
    found = price(
        tally(
            trace,
            placement,
            wire=cost.wire,
            homes=homes,
            groups=step.astype(np.int32),
        ),
        cost,
    )
    means = {
        name: float(getattr(found, name).sum(axis=-1).mean() * 1e3)
        for name in ("compute", "dispatch", "combine")
    }
    return Said(
        step=float(found.total.mean() * 1e3),
        experts=means["compute"],
        exchange=means["dispatch"] + means["combine"],
    )
