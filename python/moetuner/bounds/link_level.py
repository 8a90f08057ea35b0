"""The links that a bound looks at: of nodes where there are several, else of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    @classmethod
    def of(cls, problem: PlacementProblem, replicas: bool) -> LinkLevel:
        """The level of a problem."""
        topology, cost = problem.topology, problem.workload.cost
        rates, rules = cost.rates(topology), cost.wire.rules
        several = topology.num_nodes > 1
        per_group = topology.ranks_per_node if several else 1
        dispatch, combine = rates.dispatch, rates.combine
        links = rates.node_links if several else rates.rank_links
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
        )

    @property
    def leaves(self) -> float:
        """Share of uniform homes that are not in a given group."""
        return 1 - 1 / self.num_groups


def _fastest(factors: list[float]) -> float:
    """Of links that differ, the least that a row takes counts for every group."""
    return min(factors, default=1.0)
