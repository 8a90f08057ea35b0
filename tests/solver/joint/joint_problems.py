"""Problems of the joint planner's tests, drawn and made up, and its rounds."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload, price, tally_batches
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions
from moetuner.solver.heuristics.starts import start_ranks
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.scenarios import SearchProfile
from strategies import TOY_COST, machines, make_trace, random_ids, random_problem

NOTHING_MORE = SearchProfile(
    scenario_tokens=0, peak=0, pooled=0, variance=0, rank_copies=0, node_copies=0
)

TOPOLOGIES = [
    Topology(num_ranks=g, ranks_per_node=m)
    for g, m in [(2, 1), (2, 2), (4, 2), (4, 4), (6, 3), (6, 1)]
]


@st.composite
def problems(
    draw,
    max_experts=12,
    homes=(Homes.UNIFORM,),
    topologies=TOPOLOGIES,
    num_layers=2,
    **options,
):
    """A small problem with batches, on one or two link levels, with empty slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    topology = draw(st.sampled_from(topologies))
    num_experts = draw(st.integers(topology.num_ranks, max_experts))
    num_tokens = draw(st.sampled_from([1, 40, 150]))
    top_k = min(3, num_experts)
    ids = random_ids(rng, num_tokens, num_layers, num_experts, top_k, 0.1, 2.0)
    trace = make_trace(
        ids,
        num_experts,
        sequence=np.arange(num_tokens, dtype=np.int32) // 7,
        ranked=True,
        home_rank=rng.integers(0, topology.num_ranks, num_tokens).astype(np.int16),
    )
    speeds = draw(st.sampled_from([(), tuple(rng.uniform(0.5, 1, topology.num_ranks))]))
    cost = replace(
        TOY_COST,
        hardware=draw(machines(TOY_COST.hardware, topology)),
        wire=draw(st.sampled_from(Wire)),
        homes=draw(st.sampled_from(homes)),
        rank_speeds=speeds,
    )
    workload = Workload(
        traces=(trace,), cost=cost, batch_tokens=draw(st.sampled_from([0, 30, 70]))
    )
    slots = -(-num_experts // topology.num_ranks) + draw(st.integers(0, 1))
    problem = PlacementProblem.from_workload(
        workload, topology, slots_per_rank=slots, **options
    )
    return problem, rng


def rounds_of(problem, profile, seed=0):
    return LayerRounds(
        problem=problem,
        options=SolverOptions(seed=seed, threads=2),
        profile=profile,
        start=start_ranks(problem)[0],
        runner=Interruptible(),
    )


def anneal(rounds, start, proposals, seed=1):
    return rounds.anneal(start, proposals, 60.0, seed, np.zeros(1, np.int32))


def big_problem(rng, **options):
    return random_problem(
        rng, 6, 32, Topology(num_ranks=8, ranks_per_node=4), **options
    )


def modelled(problem):
    return replace(problem, objective="modelled-time")


def exchange_seconds(problem, placement):
    """Mean over batches of what the links take."""
    (trace,), (batches,) = problem.workload.traces, problem.workload.batches
    cost = problem.workload.cost
    parts = price(tally_batches(trace, placement, cost, batches), cost)
    return (parts.dispatch + parts.combine).sum(axis=1).mean()


class FakeTime:
    """Time that passes when somebody is seen to work."""

    now = 0.0

    def monotonic(self):
        return self.now


def round_of(method, fake):
    """A round that does little in a second."""

    def work(rounds, proposals, seconds):
        fake.now += min(seconds, 1.0)
        return method(rounds, min(proposals, 50), np.inf)

    return work
