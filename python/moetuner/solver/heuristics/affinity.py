"""Layer-to-layer affinity alone, as ExFlow does it: a baseline.

ExFlow (arXiv 2401.08383) keeps as many tokens as it can on their rank from one layer to
the next, with equally many experts on each rank, and looks at no load; nodes come
first, ranks inside each node second. It solves an integer program; here layers are
placed in turn, each optimally given its neighbours (an assignment problem), until no
layer can be improved.

Legend: L layers, E experts, P places (nodes, then ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import NO_CONFIG, Answer, Heuristic, NoConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions

    Floats = NDArray[np.float64]

MAX_SWEEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AffinitySolver(Heuristic):
    """Keeps tokens where they are; hot experts may crowd together."""

    config: NoConfig = NO_CONFIG
    name: str = "affinity"
    objectives: tuple[Objective, ...] = (
        Objective.TOTAL_TRAFFIC,
        *(o for o in Objective if o is not Objective.TOTAL_TRAFFIC),
    )

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,  # noqa: ARG002
        clock: Clock,
    ) -> Answer:
        """See `Heuristic`."""
        flows = problem.statistics.require_transitions("solver affinity").astype(float)
        topology, start = problem.topology, self._start(problem)
        node_of = start // topology.ranks_per_node
        inside: NDArray[np.int32] | None = None
        if topology.num_nodes > 1:
            node_of = sweep(flows, node_of, topology.num_nodes, clock)
            start, inside = _spread(node_of, start, topology.ranks_per_node), node_of
        rank_of = start
        if topology.ranks_per_node > 1:
            rank_of = sweep(flows, start, topology.num_ranks, clock, inside)
        return Answer(found=rank_of)

    def _start(self, problem: PlacementProblem) -> NDArray[np.int32]:
        blocks: NDArray[np.int32] = contiguous_rank_of(
            problem.num_layers, problem.num_experts, problem.topology.num_ranks
        )
        return blocks


def sweep(
    flows: Floats,
    place_of: NDArray[np.int32],
    num_places: int,
    clock: Clock,
    inside: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """Improve the places [L, E] layer by layer; their sizes stay as they are.

    Begins twice, from `place_of` and from layers that follow the one before, and keeps
    the better end. With ``inside`` [L, E], nodes, an expert only goes to places of its
    own node.
    """
    chained = place_of.copy()
    for layer in range(1, len(chained)):
        _place_layer(flows, chained, layer, num_places, inside, ahead=False)
    ends: list[tuple[float, NDArray[np.int32]]] = []
    for places in (place_of.copy(), chained):
        stale = np.ones(len(places), bool)
        for _ in range(MAX_SWEEPS):
            gained = 0.0
            for layer in range(len(places)):
                # A layer whose neighbours stayed is placed best already.
                if stale[layer] and clock.left > 0:
                    before = places[layer].copy()
                    gained += _place_layer(flows, places, layer, num_places, inside)
                    if (places[layer] != before).any():
                        stale[max(layer - 1, 0) : layer + 2] = True
                    stale[layer] = False
            if gained <= 1e-9 * max(float(flows.sum()), 1.0):
                break
        ends.append((kept_flow(flows, places), places))
    better = int(ends[1][0] > ends[0][0])
    return ends[better][1]


def kept_flow(flows: Floats, place_of: NDArray[np.int32]) -> float:
    """Flow that stays in its place, summed over layer pairs."""
    same = place_of[:-1, :, None] == place_of[1:, None, :]
    return float((flows * same).sum())


def _place_layer(
    flows: Floats,
    place_of: NDArray[np.int32],
    layer: int,
    num_places: int,
    inside: NDArray[np.int32] | None,
    *,
    ahead: bool = True,
) -> float:
    """Give a layer's experts the best places given its neighbours; returns the gain."""
    onehot, here = np.eye(num_places), place_of[layer]
    kept = np.zeros((len(here), num_places))
    if layer:
        kept += flows[layer - 1].T @ onehot[place_of[layer - 1]]
    if ahead and layer + 1 < len(place_of):
        kept += flows[layer] @ onehot[place_of[layer + 1]]
    slots = np.sort(here)
    value = kept[:, slots]
    if inside is not None:
        owner = np.empty(num_places, np.int64)  # node of each place in use
        owner[here] = inside[layer]
        value[inside[layer][:, None] != owner[slots]] = -1 - value.sum()
    experts, chosen = linear_sum_assignment(value, maximize=True)
    before = float(kept[np.arange(len(here)), here].sum())
    place_of[layer] = slots[chosen]
    return float(value[experts, chosen].sum()) - before


def _spread(
    node_of: NDArray[np.int32], blocks: NDArray[np.int32], ranks_per_node: int
) -> NDArray[np.int32]:
    """Ranks [L, E] inside the nodes, in order of expert ids, as full as `blocks`."""
    order = np.argsort(node_of, axis=1, kind="stable")
    rank_of = np.empty_like(blocks)
    np.put_along_axis(rank_of, order, np.sort(blocks, axis=1), axis=1)
    assert (rank_of // ranks_per_node == node_of).all()
    return rank_of
