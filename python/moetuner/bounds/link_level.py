"""The links that a bound looks at: of nodes where there are several, else of ranks.

Where rows are passed on inside a node after all have crossed, those links add to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner._core import Hops

if TYPE_CHECKING:
    from moetuner._core import Rows
    from moetuner.problem import PlacementProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkLevel:
    """The links that are bounded, and what stands at their ends."""

    num_groups: int
    ranks_per_group: int
    slots: int
    """Experts that a group holds at most."""
    spare: int
    """Slots of a layer that may hold replicas."""
    equal: bool
    """Whether groups are equally full, empty slots counted as experts without rows."""
    rows: Rows
    """What a token sends; with `Rows.PER_RANK` a group gets at least a row of it."""
    dispatch: float
    """Seconds per row at least, where it enters a group and where it leaves again."""
    combine: float
    latency: float
    inside: dict[str, float]
    """By direction, seconds at least of a token's visit to a rank: the hop inside its
    node, from uniform homes. 0 where that is not a hop of its own."""

    @classmethod
    def of(cls, problem: PlacementProblem, replicas: bool) -> LinkLevel:
        """The level of a problem."""
        topology, cost = problem.topology, problem.workload.cost
        rates, rules = cost.rates(topology), cost.wire.rules
        several = topology.num_nodes > 1
        per_group = topology.ranks_per_node if several else 1
        dispatch, combine = rates.dispatch, rates.combine
        links = rates.node_links if several else rates.rank_links
        own_hop = several and rules.hops is Hops.IN_TURN
        passed_on = 1 - 1 / per_group if own_hop else 0.0  # else it is the gateway
        inside = rates.rank_links
        slots = problem.slots_per_rank
        spare = problem.spare_slots if replicas else 0
        return cls(
            num_groups=topology.num_ranks // per_group,
            ranks_per_group=per_group,
            slots=slots * per_group,
            spare=spare,
            equal=not spare,
            rows=rules.rows,
            dispatch=_fastest(links.ingress)
            * (dispatch.node_row if several else dispatch.rank_row),
            combine=_fastest(links.egress)
            * (combine.node_row if several else combine.rank_row),
            latency=dispatch.node_latency if several else dispatch.rank_latency,
            inside={
                "dispatch": passed_on * _fastest(inside.ingress) * dispatch.rank_row,
                "combine": passed_on * _fastest(inside.egress) * combine.rank_row,
            },
        )

    @property
    def leaves(self) -> float:
        """Share of uniform homes that are not in a given group."""
        return 1 - 1 / self.num_groups


def _fastest(factors: list[float]) -> float:
    """Of links that differ, the least that a row takes counts for every group."""
    return min(factors, default=1.0)
