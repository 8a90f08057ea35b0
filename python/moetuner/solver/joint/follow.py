"""Rounds of annealing where homes follow: what layers do together.

A token goes on from the rank of its first expert, so it needs no row to the experts of
the next layer that are there. Even layers and odd ones take turns.

Legend: T tokens, L layers, E experts, G ranks, N nodes, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

import moetuner._core as _core
from moetuner.solver.base import place
from moetuner.solver.joint.layers import search_options
from moetuner.solver.joint.scenarios import (
    Scenarios,
    SearchProfile,
    first_homes,
    make_scenarios,
    members,
    search_problem,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import SolverOptions
    from moetuner.solver.joint.interruptible import Interruptible

    RankOf = NDArray[np.int32]

HOT, COLD = 0.3, 0.01
"""Temperatures, in units of the median |change| of a random swap."""
SWEEPS = 8, 64
"""Fewest and most turns of even and odd layers in a round."""
SWEEP_PROPOSALS = 4_000
"""Proposals per layer and sweep, between those two."""


@dataclass(kw_only=True)
class FollowRounds:
    """Annealing of all layers together; the best of all rounds is kept.

    Rounds begin at `layered` with its clusters lined up, where nodes hold several ranks
    in two ways: nodes as they are, or all ranks free. What is `known` takes the place
    of the worse of them where it is better.
    """

    problem: PlacementProblem
    options: SolverOptions
    profile: SearchProfile
    runner: Interruptible
    layered: RankOf
    """Ranks [L, E] of layers by themselves."""
    known: RankOf | None = None
    """Ranks [L, E] of what is best so far, searched or not."""
    rank_of: RankOf = field(init=False)
    cost: float = np.inf
    _scenarios: Scenarios = field(init=False)
    _search: _core.SearchProblem = field(init=False)
    _starts: list[RankOf] = field(init=False)
    _open: list[int] = field(init=False)
    _last: list[float] = field(init=False)
    _rounds: int = 0

    def __post_init__(self) -> None:
        workload = self.problem.workload
        self._scenarios = make_scenarios(workload, self.profile.scenario_tokens)
        self._search = search_problem(
            self.problem,
            self._scenarios,
            self.profile,
            home=first_homes(self.problem, self._scenarios),
        )
        topology = self.problem.topology
        groups = [topology.num_ranks]
        if topology.num_nodes > 1 and topology.ranks_per_node > 1:
            groups.insert(0, topology.ranks_per_node)
        self._starts = [self.align(self.layered, group) for group in groups]
        costs = [self._cost_of(start) for start in self._starts]
        if self.known is not None and (known := self._cost_of(self.known)) < max(costs):
            worst = int(np.argmax(costs))
            self._starts[worst], costs[worst] = self.known, known
        self._last = [np.inf] * len(groups)
        self._open = list(range(len(groups)))
        self.rank_of, self.cost = self._starts[int(np.argmin(costs))], min(costs)

    def _cost_of(self, rank_of: RankOf) -> float:
        """Its search cost."""
        slots, at_once = members(self.problem, rank_of), np.ones(1, np.int32)
        _, cost = self.anneal(slots, 0, np.inf, 0, at_once)
        return float(cost.sum())

    def round(self, proposals: int, seconds: float) -> bool:
        """Anneal all layers from every open start; whether they are better now."""
        before = self.cost
        for start in self._open:
            self._try(start, proposals, seconds / len(self._open))
        return self.cost < before

    @property
    def placement(self) -> Placement:
        """The best found so far."""
        return place(self.problem, self.rank_of)

    def settle(self) -> int:
        """Keep to the start that went best last time; of how many it is one."""
        number = len(self._open)
        self._open = [min(self._open, key=lambda start: self._last[start])]
        return number

    def _try(self, start: int, proposals: int, seconds: float) -> None:
        self._rounds += 1
        seed = self.options.round_seed(self._rounds)
        slots = members(self.problem, self._starts[start])
        found, cost = self.runner.run(
            lambda stop: self.anneal(slots, proposals, seconds, seed, stop)
        )
        self._last[start] = float(cost.sum())
        if self._last[start] < self.cost:
            self.rank_of = found[:, : self.problem.num_experts]
            self.cost = self._last[start]

    def anneal(
        self,
        start: RankOf,
        proposals: int,
        seconds: float,
        seed: int,
        stop: NDArray[np.int32],
    ) -> tuple[RankOf, NDArray[np.float64]]:
        """Ranks of `members` after annealing, [L, P], and search costs, [L]."""
        options = search_options(
            self.options,
            proposals,
            seconds,
            seed,
            hot=HOT,
            cold=COLD,
            sweeps=int(np.clip(proposals // SWEEP_PROPOSALS, *SWEEPS)),
        )
        return _core.search_layers(self._search, options, start, stop)

    def align(self, rank_of: RankOf, group: int) -> RankOf:
        """Name whole clusters anew, layer by layer, so that tokens stay where they are.

        Clusters of ``group`` neighbouring ranks stay together (a node's, or all).
        Exact for each layer given the one before it: groups first, then ranks inside.
        """
        num_ranks = self.problem.topology.num_ranks
        homes = first_homes(self.problem, self._scenarios)
        aligned: RankOf = rank_of.copy()
        for layer in range(len(rank_of)):
            chosen = self._scenarios.topk_ids[:, layer].astype(np.int64)
            valid = chosen >= 0
            ranks = np.where(valid, rank_of[layer][chosen], -1)
            if layer:
                kept = _kept(homes, ranks, num_ranks)
                new_name = _name_clusters(kept, group)
                aligned[layer] = new_name[rank_of[layer]]
                ranks = np.where(valid, new_name[ranks], -1)
            homes = np.where(ranks[:, 0] >= 0, ranks[:, 0], homes).astype(np.int32)
        return aligned


def _kept(
    homes: NDArray[np.int32], ranks: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    """Tokens [home, cluster] that find an expert of the cluster, each once."""
    ordered = np.sort(ranks, axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    cell = homes[:, None].astype(np.int64) * num_ranks + ordered
    count = np.bincount(cell[first & (ordered >= 0)], minlength=num_ranks**2)
    return count.reshape(num_ranks, num_ranks).astype(np.int64)


def _name_clusters(kept: NDArray[np.int64], per_node: int) -> NDArray[np.int32]:
    """New rank of each cluster; clusters of a node stay together."""
    num_ranks = len(kept)
    nodes = num_ranks // per_node
    by_node = kept.reshape(nodes, per_node, nodes, per_node)
    inside = np.empty((nodes, nodes), np.int64)
    names = np.empty((nodes, nodes, per_node), np.int64)
    for node in range(nodes):
        for group in range(nodes):
            block = by_node[node, :, group]
            rank, cluster = linear_sum_assignment(block, maximize=True)
            names[node, group, cluster] = rank
            inside[node, group] = block.sum() + block[rank, cluster].sum()
    new_name = np.empty(num_ranks, np.int32)
    chosen, groups = linear_sum_assignment(inside, maximize=True)
    for node, group in zip(chosen.tolist(), groups.tolist(), strict=True):
        first = group * per_node
        new_name[first : first + per_node] = node * per_node + names[node, group]
    return new_name
