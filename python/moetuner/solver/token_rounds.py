"""Rounds of the search that walks tokens: homes that follow or are recorded, replicas.

Legend: T tokens, L layers, E experts, G ranks, N nodes, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

import moetuner._core as _core
from moetuner.cost import Homes, Wire
from moetuner.placement import EMPTY
from moetuner.solver.scenarios import (
    Scenarios,
    SearchProfile,
    make_scenarios,
    search_weights,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.background import Interruptible
    from moetuner.solver.base import SolverOptions

    Floats = NDArray[np.float64]
    Slots = NDArray[np.int32]

WARM, COOL = 0.1, 0.01
"""Temperatures, in units of the median |change| of a random move."""
MAX_WALKED_TOKENS = 6_144
"""Tokens that are walked; a move costs time in proportion."""
SWEEPS = 8
"""Even and odd layers take turns so many times in a round."""
_WIRES = {Wire.DEDUP: 0, Wire.PER_EXPERT: 1, Wire.ALLGATHER: 2}


@dataclass(kw_only=True)
class TokenRounds:
    """Annealing with exact changes of what sampled tokens cost on their way."""

    problem: PlacementProblem
    options: SolverOptions
    profile: SearchProfile
    runner: Interruptible
    replicas: bool = False
    _scenarios: Scenarios = field(init=False)
    _homes: NDArray[np.int32] = field(init=False)
    _rounds: int = 0

    def __post_init__(self) -> None:
        workload = self.problem.workload
        assert workload is not None
        self._scenarios = make_scenarios(
            workload, self.profile.scenario_tokens, MAX_WALKED_TOKENS
        )
        tokens, num_ranks = self._scenarios.token, self.problem.topology.num_ranks
        self._homes = (tokens % num_ranks).astype(np.int32)
        if workload.cost.homes is Homes.RECORDED:
            assert self._scenarios.home_rank is not None
            self._homes = self._scenarios.home_rank.astype(np.int32)

    def round(
        self,
        start: Placement,
        proposals: int,
        seconds: float,
        *,
        hot: float,
        cold: float,
    ) -> Placement:
        """The placement after annealing from `start`; it may be a worse one."""
        self._rounds += 1
        seed = self.options.seed * 1_000_003 + self._rounds
        slots, _ = self.runner.run(
            lambda stop: self.anneal(
                start.slot_experts, proposals, seconds, seed, stop, hot=hot, cold=cold
            )
        )
        return replace(start, slot_experts=slots)

    def anneal(
        self,
        slot_experts: Slots,
        proposals: int,
        seconds: float,
        seed: int,
        stop: NDArray[np.int32],
        *,
        hot: float,
        cold: float,
        sweeps: int = SWEEPS,
    ) -> tuple[Slots, Floats]:
        """Slots after annealing, [L, P], and search costs, [L].

        A layer's cost holds its way to the next one too, where homes follow.
        """
        problem, scenarios = self.problem, self._scenarios
        workload = problem.workload
        assert workload is not None
        cost, topology = workload.cost, problem.topology
        speeds = cost.rank_speeds or (1.0,) * topology.num_ranks
        both = cost.shape.dispatch_bytes + cost.shape.combine_bytes
        found: tuple[Slots, Floats] = _core.search_tokens(
            scenarios.topk_ids,
            scenarios.begin,
            scenarios.row_scale,
            scenarios.weight,
            np.array(speeds, np.float64),
            self._homes,
            scenarios.token,
            walk_weights(problem, self.profile),
            cost.shape.dispatch_bytes / both,
            problem.num_experts,
            topology.ranks_per_node,
            _WIRES[cost.wire],
            cost.homes is Homes.FOLLOW,
            self.replicas,
            slot_experts,
            proposals,
            sweeps,
            hot,
            cold,
            seed,
            self.options.threads,
            seconds,
            stop,
        )
        return found

    def score(self, placement: Placement) -> float:
        """Search cost of a placement, on the sampled tokens."""
        if self.runner.interrupted:
            return float("inf")
        _, cost = self.anneal(
            placement.slot_experts,
            0,
            float("inf"),
            0,
            np.zeros(1, np.int32),
            hot=WARM,
            cold=WARM,
            sweeps=1,
        )
        return float(cost.sum())

    def align(self, rank_of: Slots, group: int) -> Slots:
        """Name whole clusters anew, layer by layer, so that tokens stay where they are.

        Clusters of ``group`` neighbouring ranks stay together (a node's, or all).
        Exact for each layer given the one before it: groups first, then ranks inside.
        """
        num_ranks = self.problem.topology.num_ranks
        ids = self._scenarios.topk_ids
        aligned: Slots = rank_of.copy()
        homes = self._homes
        for layer in range(len(rank_of)):
            chosen = ids[:, layer].astype(np.int64)
            valid = chosen >= 0
            ranks = np.where(valid, rank_of[layer][chosen], -1)
            if layer:
                kept = _kept(homes, ranks, num_ranks)
                new_name = _name_clusters(kept, group)
                aligned[layer] = new_name[rank_of[layer]]
                ranks = np.where(valid, new_name[ranks], -1)
            homes = np.where(ranks[:, 0] >= 0, ranks[:, 0], homes).astype(np.int32)
        return aligned


def walk_weights(problem: PlacementProblem, profile: SearchProfile) -> Floats:
    """`search_weights`, copies counted as remote ranks and nodes of a walk."""
    weights = search_weights(problem, profile)
    topology = problem.topology
    # A distinct rank is remote for all homes but one, a distinct node likewise.
    weights[9] *= topology.num_ranks / max(topology.num_ranks - 1, 1)
    weights[10] *= topology.num_nodes / max(topology.num_nodes - 1, 1)
    return weights


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


def spread_replicas(problem: PlacementProblem, placement: Placement) -> Placement:
    """Empty slots filled with copies of the experts with most rows per copy."""
    topology, width = problem.topology, problem.slots_per_rank
    load = problem.statistics.load
    slots = np.full((problem.num_layers, topology.num_ranks, width), EMPTY, np.int32)
    old = placement.slot_experts.reshape(problem.num_layers, topology.num_ranks, -1)
    slots[..., : old.shape[2]] = old
    for layer, rows in zip(slots, load, strict=True):
        copies = np.bincount(layer[layer >= 0], minlength=problem.num_experts)
        for _ in range(int((layer == EMPTY).sum())):
            for expert in np.argsort(-rows / copies, kind="stable"):
                free = (layer == EMPTY).any(axis=1) & ~(layer == expert).any(axis=1)
                if not free.any():
                    continue
                on_rank = [rows[r[r >= 0]].sum() for r in layer]
                rank = int(np.where(free, on_rank, np.inf).argmin())
                layer[rank, int((layer[rank] == EMPTY).argmax())] = expert
                copies[expert] += 1
                break
    return replace(placement, slot_experts=slots.reshape(problem.num_layers, -1))
