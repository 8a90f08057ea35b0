"""Routings that are known beforehand, and what they put on links and ranks.

Legend: T tokens of a rank, K top-k, E experts, G ranks, S slots of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.samples import Case, LayerShape, Load
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.tally import RoutingTally, tally
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYER = np.zeros(1, np.int32)
_CIRCLES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownLoad:
    """Tokens of all ranks, and where they go."""

    trace: Trace
    placement: Placement

    def ids(self, rank: int) -> NDArray[np.int64]:
        """[T, K] of the tokens of one rank; -1 is padding."""
        mine = self.trace.topk_ids[self.trace.home_rank == rank, 0]
        ids: NDArray[np.int64] = mine.astype(np.int64)
        return ids

    @cached_property
    def counts(self) -> RoutingTally:
        """Rows on every link and rank, by the evaluator."""
        return tally(self.trace, self.placement, homes=Homes.RECORDED)


def loads_of(topology: Topology) -> tuple[Load, ...]:
    """Those that differ on these ranks."""
    found = [Load.LOCAL]
    if topology.num_ranks > 1:
        if topology.ranks_per_node > 1:
            found.append(Load.NEXT)
        if topology.num_nodes > 1:
            found.append(Load.NEXT_NODE)
        if topology.num_ranks > 2:
            found += [Load.TO_ONE, Load.FROM_ONE]
        found.append(Load.UNIFORM)
    return tuple(found)


def spread_evenly(shape: LayerShape, topology: Topology) -> Placement:
    """Experts in order, with empty slots where ranks cannot hold equally many."""
    rank_of = np.arange(shape.num_experts) * topology.num_ranks // shape.num_experts
    return Placement.from_rank_of(rank_of[None], layer_ids=_LAYER, topology=topology)


def known_load(case: Case, topology: Topology, seed: int) -> KnownLoad:
    """The tokens of a case, for the experts of `spread_evenly`.

    ``topology`` is of the ranks that take part.
    """
    placement = spread_evenly(case.shape, topology)
    rng = np.random.default_rng(seed)
    own = [
        _ids(case.load, rank, placement, case.shape.top_k, case.num_tokens, rng)
        for rank in range(topology.num_ranks)
    ]
    return KnownLoad(
        trace=Trace(
            topk_ids=np.ascontiguousarray(np.concatenate(own)[:, None]),
            num_experts=case.shape.num_experts,
            layer_ids=_LAYER,
            home_rank=np.repeat(
                np.arange(topology.num_ranks, dtype=np.int16), list(map(len, own))
            ),
        ),
        placement=placement,
    )


def uneven(rows: int, active: int) -> NDArray[np.int32]:
    """Rows of each active expert [A], from one to about twice the mean.

    Routers share them out unevenly. Even shares of round sizes fill all tiles of a
    matrix product, and looked up to a third faster.
    """
    spare = rows - active
    ends = np.rint(spare * (np.arange(active + 1) / active) ** 2).astype(np.int32)
    return 1 + np.diff(ends)


@lru_cache(maxsize=4096)
def case_counts(case: Case, ranks_per_node: int, seed: int) -> RoutingTally:
    """Rows on every link and rank in a case; `ranks_per_node` of all ranks."""
    in_node = min(ranks_per_node, case.num_ranks)
    topology = Topology(num_ranks=case.num_ranks, ranks_per_node=in_node)
    return known_load(case, topology, seed).counts


def _ids(
    load: Load,
    rank: int,
    placement: Placement,
    top_k: int,
    num_tokens: int,
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """[T, K] of the tokens of one rank."""
    topology = placement.topology
    node, place = divmod(rank, topology.ranks_per_node)
    everywhere = np.arange(placement.num_experts, dtype=np.int16)
    if load is Load.UNIFORM:
        return _choose(everywhere, top_k, num_tokens, rng)
    if load is Load.FROM_ONE:
        return _one_of_each(placement, top_k, num_tokens if rank == 0 else 0, rng)
    first = node * topology.ranks_per_node
    next_node = (node + 1) % topology.num_nodes
    target = {
        Load.LOCAL: rank,
        Load.NEXT: first + (place + 1) % topology.ranks_per_node,
        Load.NEXT_NODE: next_node * topology.ranks_per_node + place,
        Load.TO_ONE: 0,
    }[load]
    return _choose(_experts_of(placement, target), top_k, num_tokens, rng)


def _choose(
    experts: NDArray[np.int16], top_k: int, num_tokens: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """K different ones for each token, padding where there are fewer.

    A token takes neighbours of one of some shuffled circles.
    """
    ids = np.full((num_tokens, top_k), -1, np.int16)
    width = min(top_k, experts.size)
    circles = np.stack([rng.permutation(experts) for _ in range(_CIRCLES)])
    circle = rng.integers(_CIRCLES, size=num_tokens)
    start = rng.integers(experts.size, size=num_tokens)
    place = (start[:, None] + np.arange(width)) % experts.size
    ids[:, :width] = circles[circle[:, None], place]
    return ids


def _one_of_each(
    placement: Placement, top_k: int, num_tokens: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """For each token experts of K different ranks, of as many as there are."""
    num_ranks = placement.topology.num_ranks
    holders = [r for r in range(num_ranks) if _experts_of(placement, r).size]
    chosen = _choose(np.array(holders, np.int16), top_k, num_tokens, rng)
    ids = np.full_like(chosen, -1)
    for rank in holders:
        here = chosen == rank
        ids[here] = rng.choice(_experts_of(placement, rank), here.sum())
    return ids


def _experts_of(placement: Placement, rank: int) -> NDArray[np.int16]:
    size = placement.slots_per_rank
    slots = placement.slot_experts[0, rank * size : (rank + 1) * size]
    return slots[slots >= 0].astype(np.int16)
