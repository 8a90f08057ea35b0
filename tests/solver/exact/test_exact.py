"""Dynamic programming over partitions: the oracle, other solvers, the clock."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.bounds import certify
from moetuner.errors import SolverError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.rates import Bandwidth
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.exact.partitions import partitions, renamings
from moetuner.trace import CountTrace
from oracle import oracle
from strategies import TOY_COST, examples, make_trace, placement_problems, random_ids
from tiny import tiny_problems
from zipf_trace import zipf_trace

EXACT = get_solver("exact")


@pytest.mark.parametrize(
    ("ranks", "per_node", "count"),
    [(4, 4, 105), (2, 2, 35), (8, 4, 35), (4, 2, 315), (8, 8, 1), (4, 1, 105)],
)
def test_states_of_eight_experts_are_counted_right(ranks, per_node, count):
    """8! / (2!^4 4!) = 105 and so on; two nodes of four: 8! / (4! 4! 2)."""
    topology = Topology(num_ranks=ranks, ranks_per_node=per_node)
    states = partitions(8, topology, 8 // ranks, 1000)
    assert len(states) == count == len(np.unique(states, axis=0))
    # With all their names they are all placements: none is missing, none twice.
    if ranks <= 4:
        named = renamings(topology, 100)[:, states].reshape(-1, 8)
        assert len(np.unique(named, axis=0)) == {4: 2520, 2: 70}[ranks]


@examples(12)
@given(tiny_problems())
def test_it_finds_what_the_oracle_finds(case):
    problem, _ = case
    truth = oracle(problem)
    workload = problem.workload
    holes = any((trace.topk_ids < 0).any() for trace in workload.traces)
    if (
        workload.worst_case
        or not workload.cost.alike(problem.topology)
        or (holes and workload.cost.homes is Homes.FOLLOW)
    ):
        return  # refused, see below
    solution = EXACT.solve(problem)
    assert solution.value == pytest.approx(truth.value, rel=1e-9, abs=1e-18)


@examples(12)
@given(
    placement_problems(max_experts=5, max_layers=3, shapes=((2, 1), (2, 2), (4, 2))),
    st.sampled_from([o for o in Objective if o is not Objective.MODELLED_TIME]),
    st.sampled_from([0, 4]),
)
def test_other_objectives_too(case, objective, slots):
    slots = slots and max(slots, case[0].slots_per_rank)
    problem = replace(case[0], objective=objective, slots_per_rank=slots)
    solution = EXACT.solve(problem)
    assert solution.status is SolveStatus.OPTIMAL
    truth = oracle(problem).value
    assert solution.value == pytest.approx(truth, rel=1e-9, abs=1e-12)


def mixtral_like(num_ranks, per_node, *, num_tokens=8192, **cost):
    trace = zipf_trace(
        num_tokens=num_tokens,
        num_layers=32,
        num_experts=8,
        top_k=2,
        num_sequences=16,
        skew=0.3,
        affinity=0.5,
    )
    workload = Workload(traces=(trace,), cost=CostModel(**cost), batch_tokens=2048)
    topology = Topology(num_ranks=num_ranks, ranks_per_node=per_node)
    return PlacementProblem.from_workload(workload, topology)


@pytest.mark.slow
@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 4), (8, 4), (8, 8), (4, 2)])
def test_a_model_of_eight_experts_is_solved_in_seconds(ranks, per_node, homes):
    problem = mixtral_like(ranks, per_node, homes=homes)
    if (ranks, per_node, homes) == (8, 4, Homes.FOLLOW):
        with pytest.raises(SolverError, match="840 states x 48 renamings"):
            EXACT.solve(problem)  # gateways tell ranks of a node apart
        return
    solution = EXACT.solve(problem, SolverOptions(time_limit=600, threads=2))
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.gap == 0
    for name in ("contiguous", "eplb", "affinity", "coactivation"):
        assert get_solver(name).solve(problem).value >= solution.value * (1 - 1e-9)
    proof = certify(problem, solution.placement, max_iterations=50)
    assert proof.lower_bound <= solution.value * (1 + 1e-9)


@pytest.mark.parametrize("wire", list(Wire))
def test_names_inside_a_node_matter_where_rows_come_back_through_gateways(wire):
    ids = random_ids(np.random.default_rng(0), 40, 1, 4, 2, skew=2.0)
    fast = replace(HARDWARE["h100"], rank_latency=0.0, nic_bandwidth=1e12)
    cost = CostModel(
        hardware=fast,
        shape=ModelShape(hidden_size=64, expert_hidden_size=8),
        wire=wire,
        homes=Homes.FOLLOW,
    )
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 4, ranked=True),), cost=cost, batch_tokens=0),
        Topology(num_ranks=4, ranks_per_node=2),
    )
    truth = oracle(problem)
    assert EXACT.solve(problem).value == pytest.approx(truth.value, rel=1e-9)


@pytest.mark.parametrize("homes", Homes)
@pytest.mark.parametrize("wire", Wire)
def test_links_that_are_slower_one_way(rng, homes, wire):
    """Ranks can still be renamed, but what goes out takes longer than what returns."""
    trace = make_trace(
        random_ids(rng, 40, 2, 4, 2),
        4,
        ranked=True,
        home_rank=rng.integers(0, 4, 40).astype(np.int16),
    )
    slow_out = replace(
        TOY_COST.hardware,
        rank_bandwidth=Bandwidth(egress=(5e9,), ingress=(50e9,)),
        nic_bandwidth=Bandwidth(egress=(9e9,), ingress=(2e9,)),
    )
    cost = replace(TOY_COST, homes=homes, wire=wire, hardware=slow_out)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=cost, batch_tokens=20),
        Topology(num_ranks=4, ranks_per_node=2),
    )
    truth = oracle(problem)
    assert EXACT.solve(problem).value == pytest.approx(truth.value, rel=1e-9)


def test_time_is_kept_and_then_no_bound_is_claimed():
    problem = mixtral_like(4, 4, homes=Homes.FOLLOW)
    solution = EXACT.solve(problem, SolverOptions(time_limit=0.05))
    assert solution.status is SolveStatus.TIME_LIMIT
    assert solution.lower_bound is None


def test_spare_slots_might_hold_replicas_so_the_proof_is_about_less(rng):
    trace = make_trace(random_ids(rng, 50, 2, 4, 2), 4, ranked=True)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=TOY_COST),
        Topology(num_ranks=2, ranks_per_node=2),
        slots_per_rank=3,
    )
    solution = EXACT.solve(problem)
    assert solution.lower_bound is None
    (stage,) = solution.stages
    assert stage.status is SolveStatus.OPTIMAL
    assert stage.value == solution.value


@examples(5)
@given(
    placement_problems(
        max_experts=6,
        max_layers=3,
        shapes=((2, 2), (3, 3), (4, 2)),
        objective=Objective.LINK_TRAFFIC,
    )
)
def test_it_knows_which_pair_of_ranks_is_slow(case):
    problem, rng = case
    ranks, workload = problem.topology.num_ranks, problem.workload
    rates = rng.uniform(1e9, 2e11, (ranks, ranks)) * ~np.eye(ranks, dtype=bool)
    machine = replace(
        workload.cost.hardware,
        ranks_per_node=problem.topology.ranks_per_node,
        pair_bandwidth=rates.tolist(),
    )
    cost = replace(workload.cost, hardware=machine)
    problem = replace(problem, workload=replace(workload, cost=cost))
    solution = EXACT.solve(problem)
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(oracle(problem).value, rel=1e-9, abs=1e-18)


def test_what_is_no_sum_over_layers_is_refused(rng):
    ids = random_ids(rng, 50, 2, 4, 2)
    trace = make_trace(ids, 4, ranked=True)
    topology = Topology(num_ranks=2, ranks_per_node=2)
    holes = ids.copy()
    holes[0, 0] = -1
    counted = CountTrace(
        counts=np.ones((2, 2, 4), np.int64),
        num_tokens=np.full(2, 2),
        layer_ids=np.arange(2, dtype=np.int32),
    )
    cases = [
        ((trace,), {}, {"worst_case": True}, "worst of several traces"),
        ((trace,), {"rank_speeds": (1, 2)}, {}, "different speeds"),
        ((counted,), {"wire": Wire.ALLGATHER}, {}, "only counted loads"),
        (
            (make_trace(holes, 4, ranked=True),),
            {"homes": Homes.FOLLOW},
            {},
            "without first expert couples",
        ),
    ]
    for traces, cost, options, message in cases:
        workload = Workload(traces=traces, cost=replace(TOY_COST, **cost), **options)
        problem = PlacementProblem.from_workload(workload, topology)
        with pytest.raises(SolverError, match=message):
            EXACT.solve(problem)
    narrow = replace(
        TOY_COST.hardware, rank_bandwidth=Bandwidth(egress=(1e9, 2e9), ingress=(2e9,))
    )
    unlike = Workload(traces=(trace,), cost=replace(TOY_COST, hardware=narrow))
    problem = PlacementProblem.from_workload(unlike, topology)
    with pytest.raises(SolverError, match="links cannot be renamed"):
        EXACT.solve(problem)
    wide = make_trace(random_ids(rng, 5, 1, 16, 2), 16)
    problem = PlacementProblem.from_workload(Workload(traces=(wide,)), topology)
    with pytest.raises(SolverError, match="at most 12 experts, got 16"):
        EXACT.solve(problem)
