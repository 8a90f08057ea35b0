"""A placement problem: statistics, topology, slots, and what is to be minimised.

Legend: L layers, E experts, G ranks, S slots per rank and layer. The equations are
those of the MoETuner paper (arXiv 2502.06643v1) with its printed defects repaired:
every expert sits on exactly one rank, ILP2's second index is layer l + 1, and a
rank's traffic with itself is left out of the maximum.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_whole, one_of
from moetuner._words import amount
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.workload import Workload
    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology


class Objective(str, enum.Enum):
    """What a solver minimises; `PlacementProblem.objective_value` defines each."""

    MAX_LOAD = "max-load"
    """Mean over layers of (largest rank load / mean rank load); 1 is perfect."""
    LOAD_DEVIATION = "load-deviation"
    """Paper, ILP1: mean over layers of sum_g |T_g - mean T| / mean T; 0 is perfect."""
    LINK_TRAFFIC = "link-traffic"
    """Paper, ILP2: sum over layer pairs of the slowest link's seconds."""
    TOTAL_TRAFFIC = "total-traffic"
    """Share of layer-to-layer flow that changes ranks, in [0, 1]."""
    MODELLED_TIME = "modelled-time"
    """Seconds of one batch as the evaluator models them, mean over the batches of the
    problem's workload."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementProblem:
    """What a solver is asked; frozen, and the only definition of every objective.

    Parameters
    ----------
    workload
        Batches, wire, homes, machine and model shape.
    statistics
        Counts of the workload's traces, weighed as they count.
    topology
        Ranks and nodes.
    objective
        What is minimised, or its name.
    slots_per_rank
        Slots per rank and layer; by default just enough for all experts.

    Raises
    ------
    InvalidProblemError
        When the parts do not fit each other, or the slots do not hold all experts.
    """

    workload: Workload
    statistics: RoutingStatistics
    topology: Topology
    objective: Objective = Objective.MODELLED_TIME
    slots_per_rank: int = 0

    def __post_init__(self) -> None:
        objective = one_of(Objective, self.objective, "PlacementProblem: objective")
        object.__setattr__(self, "objective", objective)
        if not is_whole(self.slots_per_rank):
            raise InvalidProblemError(
                f"PlacementProblem: slots_per_rank must be a whole number, got "
                f"{self.slots_per_rank!r}"
            )
        self._check_workload()
        experts, ranks = self.num_experts, self.topology.num_ranks
        if experts < ranks:
            raise InvalidProblemError(
                f"PlacementProblem: {ranks} ranks but only {experts} experts; a rank "
                f"would stay empty. Use fewer ranks."
            )
        if not self.slots_per_rank:
            object.__setattr__(self, "slots_per_rank", self.min_slots)
        if self.slots_per_rank * ranks < experts:
            raise InvalidProblemError(
                f"PlacementProblem: {amount(ranks, 'rank')} x "
                f"{amount(self.slots_per_rank, 'slot')} cannot "
                f"hold {experts} experts"
            )

    @classmethod
    def from_workload(
        cls, workload: Workload, topology: Topology, **options: Any
    ) -> PlacementProblem:
        """The problem of a workload's traces, with their statistics.

        ``options`` are the other fields of the problem.
        """
        parts = [
            RoutingStatistics.from_trace(trace, coactivation=False)
            for trace in workload.traces
        ]
        return cls(
            workload=workload,
            statistics=RoutingStatistics.sum(parts, workload.weights),
            topology=topology,
            **options,
        )

    def _check_workload(self) -> None:
        trace = self.workload.traces[0]
        ids, own = trace.layer_ids.tolist(), self.statistics.layer_ids.tolist()
        if trace.num_experts != self.num_experts or ids != own:
            raise InvalidProblemError(
                f"PlacementProblem: the workload has {trace.num_experts} experts in "
                f"layers {ids}, the statistics {self.num_experts} in {own}"
            )
        self.workload.cost.check_topology(self.topology)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.statistics.num_layers

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.statistics.num_experts

    @property
    def min_slots(self) -> int:
        """Slots per rank and layer that are just enough for each expert once."""
        return -(-self.num_experts // self.topology.num_ranks)

    @property
    def spare_slots(self) -> int:
        """Slots of a layer beyond one for each expert: what a proof must think of."""
        return self.topology.num_ranks * self.slots_per_rank - self.num_experts

    @property
    def wants_replicas(self) -> bool:
        """Whether ranks were given more slots than the experts need.

        Slots that are spare because the ranks do not divide the experts stay empty.
        """
        return self.slots_per_rank > self.min_slots

    def relative_load(self) -> NDArray[np.float64]:
        """Load of each expert in units of the layer's mean rank load, [L, E].

        Sums to G in a layer; all zero where a layer saw no token.
        """
        load = self.statistics.load.astype(np.float64, order="C")
        mean = load.sum(axis=1, keepdims=True) / self.topology.num_ranks
        return load / np.where(mean > 0, mean, 1)

    def link_seconds(self) -> NDArray[np.float64]:
        """Seconds that one row needs from rank to rank, [G, G]; 0 on the diagonal."""
        cost = self.workload.cost
        row_bytes = cost.shape.hidden_size * cost.shape.dispatch_bytes
        bandwidth = cost.pair_bandwidths(self.topology)
        np.fill_diagonal(bandwidth, np.inf)
        return row_bytes / bandwidth

    @property
    def alike_links(self) -> bool:
        """Whether all links inside nodes are of one speed, and all between nodes."""
        seconds, same = self.link_seconds(), self.topology.same_node()
        pairs = ~np.eye(self.topology.num_ranks, dtype=bool)
        return all(
            len(np.unique(seconds[level & pairs])) <= 1 for level in (same, ~same)
        )

    def rank_loads(self, rank_of: NDArray[Any]) -> NDArray[np.float64]:
        """Relative load of each rank, [L, G], for experts at `rank_of` [L, E]."""
        load = self.relative_load()
        return np.stack(
            [
                np.bincount(ranks, weights=row, minlength=self.topology.num_ranks)
                for ranks, row in zip(rank_of, load, strict=True)
            ]
        )

    def rank_flows(self, rank_of: NDArray[Any]) -> NDArray[np.float64]:
        """Rows that go from rank to rank between neighbouring layers, [L - 1, G, G]."""
        transitions = self.statistics.require_transitions(self.objective.value)
        onehot = np.eye(self.topology.num_ranks)[rank_of]  # [L, E, G]
        flows: NDArray[np.float64] = (
            onehot[:-1].swapaxes(1, 2) @ transitions.astype(float) @ onehot[1:]
        )
        return flows

    def objective_value(self, placement: Placement) -> float:
        """The objective of `placement`; smaller is better.

        Raises
        ------
        InvalidPlacementError
            When the placement does not answer this problem.
        MissingStatisticsError
            When the objective needs transitions that the source does not have.
        """
        self.check(placement)
        if self.objective is Objective.MODELLED_TIME:
            return self.workload.seconds(placement)
        rank_of = placement.rank_of()
        if self.objective is Objective.MAX_LOAD:
            return float(self.rank_loads(rank_of).max(axis=1).mean())
        if self.objective is Objective.LOAD_DEVIATION:
            loads = self.rank_loads(rank_of)
            means = loads.mean(axis=1, keepdims=True)
            return float(np.abs(loads - means).sum(axis=1).mean())
        flows = self.rank_flows(rank_of)
        if self.objective is Objective.LINK_TRAFFIC:
            return float((flows * self.link_seconds()).max(axis=(1, 2)).sum())
        kept = np.trace(flows, axis1=1, axis2=2).sum()
        return float(1 - kept / flows.sum()) if flows.sum() else 0.0

    def check(self, placement: Placement) -> None:
        """Refuse a placement of another model or topology, or with too many experts."""
        wanted = (self.num_experts, self.topology, self.statistics.layer_ids.tolist())
        got = (placement.num_experts, placement.topology, placement.layer_ids.tolist())
        if wanted != got:
            raise InvalidPlacementError(
                f"placement does not answer the problem: wanted (experts, topology, "
                f"layers) {wanted}, got {got}"
            )
        most = placement.rank_sizes().max()
        if most > self.slots_per_rank:
            raise InvalidPlacementError(
                f"placement holds {amount(most, 'expert')} on a rank, the problem has "
                f"{amount(self.slots_per_rank, 'slot per rank')}"
            )

    def rank_sizes(self, rank_of: NDArray[Any]) -> NDArray[np.int64]:
        """Experts on each rank, [L, G]."""
        return np.stack(
            [np.bincount(row, minlength=self.topology.num_ranks) for row in rank_of]
        )
