"""The expert-parallelism load balancer (EPLB) that DeepSeek published, as a baseline.

Three greedy steps, after its repository (github.com/deepseek-ai/EPLB, Algorithm):

1. groups of experts are packed onto nodes, heaviest first, equally many on each;
2. inside a node the expert with the highest load per replica gets one more replica
   until all slots are filled;
3. the replicas are packed onto the node's ranks, heaviest first, equally many on each.

Where the number of groups is no multiple of the nodes, all ranks count as one node, as
published. It replicates where the problem has more slots per rank than the experts
need, and its objective allows replicas (`Objective.MODELLED_TIME`).

One difference: the published packing may put two replicas of an expert on one rank,
where the second is of no use; here the next lightest rank takes it, and a slot for
which only such replicas are left stays empty. No expert gets more replicas than there
are ranks.

Legend: E experts, G ranks, S slots per rank, N nodes, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import SolverError
from moetuner.placement.model import EMPTY, Placement
from moetuner.problem import Objective
from moetuner.solver.base import Answer, Heuristic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EplbConfig:
    """Options of `EplbSolver` alone.

    Parameters
    ----------
    num_groups
        Groups of consecutive experts that the model's router treats as one (8 in
        DeepSeek-V3); 1 where it knows none.
    """

    num_groups: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EplbSolver(Heuristic):
    """Balance by greedy replication and packing; no thought of traffic."""

    config: EplbConfig = EplbConfig()
    name: str = "eplb"
    objectives: tuple[Objective, ...] = (
        Objective.MODELLED_TIME,  # the one that allows replicas, so the one for plans
        *(o for o in Objective if o is not Objective.MODELLED_TIME),
    )

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,  # noqa: ARG002
        clock: Clock,  # noqa: ARG002
    ) -> Answer:
        """See `Heuristic`."""
        groups, topology = self.config.num_groups, problem.topology
        if groups < 1 or problem.num_experts % groups:
            raise SolverError(
                f"solver eplb: num_groups must divide the {problem.num_experts} "
                f"experts, got {groups}"
            )
        hierarchical = groups % topology.num_nodes == 0
        replicas = (
            problem.wants_replicas and problem.objective is Objective.MODELLED_TIME
        )
        slots = [
            rebalance(
                load,
                num_groups=groups if hierarchical else 1,
                num_nodes=topology.num_nodes if hierarchical else 1,
                num_ranks=topology.num_ranks,
                slots_per_rank=problem.slots_per_rank,
                replicas=replicas,
            )
            for load in problem.relative_load()
        ]
        placement = Placement(
            slot_experts=np.stack(slots).astype(np.int32),
            layer_ids=problem.statistics.layer_ids,
            num_experts=problem.num_experts,
            topology=topology,
        )
        return Answer(found=placement)


def rebalance(
    load: Floats,
    *,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    slots_per_rank: int,
    replicas: bool = True,
) -> NDArray[np.int64]:
    """Expert of each slot of one layer, int64 [P]; -1 where nothing fits.

    ``load`` is float64 [E]. Groups are packed onto nodes and stay there.
    """
    group_size = len(load) // num_groups
    ranks_per_node = num_ranks // num_nodes
    node_of_group, _ = pack(load.reshape(num_groups, -1).sum(axis=1), num_nodes)
    rows = []
    for node in range(num_nodes):
        groups = np.flatnonzero(node_of_group == node)
        experts = (groups[:, None] * group_size + np.arange(group_size)).ravel()
        # More slots than experts x ranks cannot all be used.
        used = min(ranks_per_node * slots_per_rank, len(experts) * ranks_per_node)
        used = used if replicas else len(experts)
        chosen, count = replicate(load[experts], used, ranks_per_node)
        weight = (load[experts] / count)[chosen]
        rank, _ = pack(weight, ranks_per_node, slots_per_rank, chosen)
        row = np.full((ranks_per_node, slots_per_rank), EMPTY, np.int64)
        filled = np.zeros(ranks_per_node, np.int64)
        for expert, on in zip(experts[chosen], rank, strict=True):
            if on >= 0:
                row[on, filled[on]] = expert
                filled[on] += 1
        rows.append(row.ravel())
    return np.concatenate(rows)


def replicate(
    load: Floats, num_slots: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(expert of each replica [slots], replicas of each expert [E]).

    Every expert first; then one more for the highest load per replica. An expert with
    `most` replicas, one for each rank, gets no more.
    """
    experts, count = list(range(len(load))), np.ones(len(load), np.int64)
    for _ in range(num_slots - len(load)):
        heaviest = int(np.where(count < most, load / count, -1.0).argmax())
        experts.append(heaviest)
        count[heaviest] += 1
    return np.array(experts), count


def pack(
    weight: Floats,
    num_packs: int,
    most: int = 0,
    kind: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], Floats]:
    """(pack of each item, weight of each pack), heaviest item first.

    Each goes to the lightest pack that holds fewer than ``most`` items (by default an
    equal share) and none of its own ``kind``; -1 when there is no such pack. One item
    for each pack stays in the order given, as published.
    """
    most = most or -(-len(weight) // num_packs)
    if len(weight) == num_packs and most == 1:
        return np.arange(num_packs), weight
    packs = np.full(len(weight), -1, np.int64)
    sums, sizes = np.zeros(num_packs), np.zeros(num_packs, np.int64)
    for item in np.argsort(-weight, kind="stable"):
        closed = sizes >= most
        if kind is not None:
            closed[packs[(kind == kind[item]) & (packs >= 0)]] = True
        if closed.all():
            continue
        lightest = int(np.where(closed, np.inf, sums).argmin())
        packs[item] = lightest
        sums[lightest] += weight[item]
        sizes[lightest] += 1
    return packs, sums
