"""Proven optima for models with few experts: dynamic programming over partitions.

Names of ranks do not matter to a layer by itself, only to the step from one layer to
the next. So a state is a placement of one layer up to names (105 for 8 experts on 4
ranks); between two states stands the cheapest of all renamings. The objective is a sum
over layers and steps, hence the best path through the states is the optimum. States
and steps are priced exactly, whatever the wire, the homes and the batches. Where homes
follow and rows pass gateways, ranks of a node may change names in all nodes alike only,
so there are more states.

Legend: L layers, E experts, P states, G ranks, B batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import moetuner._core as _core
from moetuner._core import ArcCost, Crossing, LinkFactors, LinkRates
from moetuner.errors import SolverError
from moetuner.evaluation.cost import Homes
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver.base import (
    NO_CONFIG,
    Clock,
    NoConfig,
    ProgressCallback,
    ProgressEvent,
    Solution,
    SolverOptions,
    SolveStatus,
    Stage,
    finish,
    place,
)
from moetuner.solver.exact.layer_costs import Batches, LayerCosts
from moetuner.solver.exact.partitions import one_of_each, partitions, renamings
from moetuner.solver.heuristics.lpt import balanced_rank_of
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement

    Floats = NDArray[np.float64]

MAX_EXPERTS = 12
MAX_STATES = 3_000
MAX_RENAMINGS = 50_000
MAX_NAMED = 1_000_000
MAX_STEPS = 20_000_000_000
"""Links that the arcs of all layers may look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactSolver:
    """Optimal for about 8 experts; refuses what it cannot enumerate."""

    config: NoConfig = NO_CONFIG
    name: str = "exact"
    objectives: tuple[Objective, ...] = (
        Objective.MODELLED_TIME,
        *(o for o in Objective if o is not Objective.MODELLED_TIME),
    )

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = SolverOptions(),
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,
    ) -> Solution:
        """See `moetuner.solver.Solver`."""
        clock = Clock(time_limit=options.time_limit)
        _check(problem)
        status, bound = SolveStatus.OPTIMAL, None
        try:
            search = _Search(problem, options, clock, progress)
            rank_of = search.best()
            bound = problem.objective_value(place(problem, rank_of))
        except TimeoutError:  # half a search proves and finds nothing
            status, rank_of = SolveStatus.TIME_LIMIT, balanced_rank_of(problem)
        except KeyboardInterrupt:
            status, rank_of = SolveStatus.INTERRUPTED, balanced_rank_of(problem)
        stages: tuple[Stage, ...] = ()
        timed = problem.objective is Objective.MODELLED_TIME
        if bound is not None and timed and problem.spare_slots:
            # Replicas are not among the states: the proof is about those without.
            stages = (
                Stage(
                    name="exact, without replicas",
                    objective=problem.objective,
                    value=bound,
                    lower_bound=bound,
                    status=status,
                    seconds=clock.seconds,
                ),
            )
            status, bound = SolveStatus.HEURISTIC, None
        return finish(
            self,
            problem,
            rank_of,
            clock,
            status=status,
            lower_bound=bound,
            stages=stages,
            warm_start=warm_start,
        )


def _check(problem: PlacementProblem) -> None:
    """Refuse what is no sum over layers and steps, or too large."""

    def refuse(reason: str) -> None:
        raise SolverError(f"solver exact: {reason}")

    if problem.num_experts > MAX_EXPERTS:
        refuse(f"at most {MAX_EXPERTS} experts, got {problem.num_experts}")
    workload = problem.workload
    if problem.objective is not Objective.MODELLED_TIME:
        return
    if workload.worst_case:
        refuse("the worst of several traces is no sum over layers")
    if not workload.cost.alike(problem.topology):
        refuse("ranks of different speeds or links cannot be renamed")
    if workload.counted:
        refuse("needs the experts of each token; a source only counted loads")
    if workload.cost.homes is not Homes.FOLLOW:
        return
    for trace in workload.traces:
        if isinstance(trace, Trace) and (trace.topk_ids[..., 0] < 0).any():
            refuse("with homes=follow a token without first expert couples all layers")


class _Search:
    """The states of one problem, and the best path through them."""

    def __init__(
        self,
        problem: PlacementProblem,
        options: SolverOptions,
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> None:
        self.problem, self.options, self.clock = problem, options, clock
        self.progress = progress
        topology = problem.topology
        self.states = partitions(
            problem.num_experts, topology, problem.slots_per_rank, MAX_STATES
        )
        self.names = np.arange(topology.num_ranks, dtype=np.int32)[None]
        self.steps = problem.objective in (
            Objective.LINK_TRAFFIC,
            Objective.TOTAL_TRAFFIC,
        )
        self.costs: LayerCosts | None = None
        homes = Homes.UNIFORM
        if problem.objective is Objective.MODELLED_TIME:
            homes = problem.workload.cost.homes
            self.steps = homes is Homes.FOLLOW
        if self.steps or homes is Homes.RECORDED:
            self.names = renamings(topology, MAX_RENAMINGS)
        if homes is Homes.RECORDED:  # names matter: every one is a state of its own
            self.states = self._named()
        elif self._pairs_differ():
            self.states, self.names = self._named(), self.names[:1]
        elif homes is Homes.FOLLOW and self._has_gateways():
            self.states = self._named()
            self.names = self.names[:1]  # of a ring no name can be changed
            if problem.workload.cost.wire.rules.crossing is Crossing.GATEWAY:
                self.names = renamings(topology, MAX_RENAMINGS, alike=True)
                self.states = one_of_each(self.states, self.names)
        if problem.objective is Objective.MODELLED_TIME:
            batches = Batches.of(problem.workload)
            self.costs = LayerCosts(
                batches, self.states, topology, problem.workload.cost
            )
        self._check_size()

    def _pairs_differ(self) -> bool:
        """Whether names of ranks say which links a step takes."""
        slowest_pair = self.problem.objective is Objective.LINK_TRAFFIC
        return slowest_pair and not self.problem.alike_links

    def _has_gateways(self) -> bool:
        """Whether rows enter a node at a rank that their sender's place decides.

        Then a layer that its own ranks send rows back to is not the same when the ranks
        of one node change names.
        """
        topology, workload = self.problem.topology, self.problem.workload
        several = topology.num_nodes > 1 and topology.ranks_per_node > 1
        return several and workload.cost.wire.rules.crossing is not Crossing.DIRECT

    def _named(self) -> NDArray[np.int32]:
        """The states with all their names."""
        count = len(self.names) * len(self.states)
        if count > MAX_NAMED:
            raise SolverError(
                f"solver exact: {count} placements of a layer with all names of ranks, "
                f"at most {MAX_NAMED} are tried"
            )
        named = self.names[:, self.states].reshape(-1, self.problem.num_experts)
        return np.unique(named, axis=0)

    def _check_size(self) -> None:
        batches = 1 if self.costs is None else self.costs.batches.weight.size
        links = len(self.states) ** 2 * len(self.names) * batches
        links *= self.problem.num_layers * self.problem.topology.num_ranks**2
        if self.steps and links > MAX_STEPS:
            raise SolverError(
                f"solver exact: {len(self.states)} states x {len(self.names)} "
                f"renamings x {batches} batches are too many"
            )

    def best(self) -> NDArray[np.int32]:
        """Rank of each expert, int32 [L, E], on a cheapest path."""
        num_layers = self.problem.num_layers
        total = self._own(0)
        back: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
        for layer in range(1, num_layers):
            if self.clock.left <= 0:
                raise TimeoutError
            if self.steps:
                arcs = self._arcs(layer)
                sums = total[:, None] + arcs["best"]
                origin = sums.argmin(axis=0)
                renamed = arcs["renamed"][origin, np.arange(len(self.states))]
                total = sums.min(axis=0)
            else:
                origin = np.full(len(self.states), total.argmin())
                renamed = np.zeros(len(self.states), np.int32)
                total = np.full(len(self.states), total.min())
            back.append((origin, renamed))
            total = total + self._own(layer)
            self._report(layer + 1)
        state = int(total.argmin())
        path = [(state, 0)]
        for origin, renamed in reversed(back):
            path[-1] = (state, int(renamed[state]))
            state = int(origin[state])
            path.append((state, 0))
        names = np.arange(self.problem.topology.num_ranks)
        rows = []
        for layer, (state, rename) in enumerate(reversed(path)):
            if layer and self.steps:
                names = names[self.names[rename]]
            rows.append(names[self.states[state]])
        return np.stack(rows).astype(np.int32)

    def _report(self, done: int) -> None:
        if self.progress:
            self.progress(
                ProgressEvent(
                    solver="exact",
                    stage="exact",
                    done=done,
                    total=self.problem.num_layers,
                    seconds=self.clock.seconds,
                )
            )

    def _own(self, layer: int) -> Floats:
        """What each state of a layer costs by itself, [P]."""
        if self.costs is not None:
            return self.costs.own(layer)
        if self.steps:
            return np.zeros(len(self.states))
        load = self.problem.relative_load()[layer]
        loads = np.eye(self.problem.topology.num_ranks)[self.states]
        loads = np.einsum("e,peg->pg", load, loads)
        if self.problem.objective is Objective.MAX_LOAD:
            return np.asarray(loads.max(axis=1))
        means = loads.mean(axis=1, keepdims=True)
        return np.asarray(np.abs(loads - means).sum(axis=1))

    def _arcs(self, layer: int) -> dict[str, Any]:
        """Cheapest step into every state of `layer` from every state before it."""
        problem, topology = self.problem, self.problem.topology
        kind, crossing = ArcCost.REMOTE, Crossing.DIRECT
        rank_links = node_links = LinkFactors()
        dispatch = LinkRates(
            rank_row=0.0, node_row=0.0, rank_latency=0.0, node_latency=0.0
        )
        if self.costs is None:
            flows = problem.statistics.require_transitions("solver exact")
            onehot = np.eye(topology.num_ranks)[self.states]
            to_ranks = np.einsum("fe,peg->pfg", flows[layer - 1].astype(float), onehot)
            to_ranks = to_ranks[None]
            shape = (*to_ranks.shape[:3], topology.num_nodes)
            to_nodes, weight = np.zeros(shape), np.ones(1)
            if problem.objective is Objective.LINK_TRAFFIC:
                kind = ArcCost.SLOWEST_PAIR
        else:
            to_ranks, to_nodes = self.costs.rows_from(layer)
            weight, cost = self.costs.batches.weight, self.costs.cost
            kind, crossing = ArcCost.EXCHANGE, cost.wire.rules.crossing
            rates = self.costs.price.rates
            dispatch = rates.dispatch
            rank_links, node_links = rates.rank_links, rates.node_links
        return _core.cheapest_arcs(
            rank_of=self.states,
            rank_rows=np.ascontiguousarray(to_ranks),
            node_rows=np.ascontiguousarray(to_nodes),
            rename=self.names,
            link_seconds=np.ascontiguousarray(problem.link_seconds()),
            weight=weight,
            ranks_per_node=topology.ranks_per_node,
            cost=kind,
            crossing=crossing,
            dispatch=dispatch,
            rank_links=rank_links,
            node_links=node_links,
            num_threads=self.options.threads,
        )
