"""Wires between nodes: a row straight to each rank, and rows of all around a ring.

All that plans, prices and proves asks for the rules of a wire, and must agree.
"""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.bounds import certify
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.tally import tally
from moetuner.evaluation.workload import Workload
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.solver import JointSolver
from oracle import oracle
from strategies import TOY_COST, make_trace, random_ids

ONE = SolverOptions(time_limit=600, threads=1)
WIRES = (Wire.DEDUP_RANKS, Wire.ALLGATHER)
# Ranks of a node, and how slow its links are; one node of all four has no use for any.
MACHINES = [(1, 0.01), (1, 50.0), (2, 0.01), (2, 50.0), (4, 1.0)]


def problem_of(rng, wire, homes, num_experts, per_node, num_layers, slow_nodes=1.0):
    ids = random_ids(rng, 60, num_layers, num_experts, 3, 0.0, 1.5)
    trace = make_trace(
        ids,
        num_experts,
        ranked=True,
        home_rank=rng.integers(0, 4, len(ids)).astype(np.int16),
        sequence=(np.arange(len(ids)) // 10).astype(np.int32),
    )
    hardware = TOY_COST.hardware
    hardware = replace(hardware, nic_bandwidth=hardware.nic_bandwidth / slow_nodes)
    cost = replace(TOY_COST, wire=wire, homes=homes, hardware=hardware)
    workload = Workload(traces=(trace,), cost=cost, batch_tokens=30)
    topology = Topology(num_ranks=4, ranks_per_node=per_node)
    return PlacementProblem.from_workload(workload, topology)


def test_rows_on_links_by_hand():
    """Home 0 of two nodes: a row to rank 1 inside it, one each to ranks 2 and 3."""
    trace = make_trace(
        np.array([[[1, 2, 3]]], np.int16), 4, home_rank=np.zeros(1, np.int16)
    )
    placement = Placement(
        slot_experts=np.array([[0, 1, 2, 3]], np.int32),
        layer_ids=trace.layer_ids,
        num_experts=4,
        topology=Topology(num_ranks=4, ranks_per_node=2),
    )
    rows = tally(trace, placement, wire=WIRES[0], homes=Homes.RECORDED)
    assert rows.rank_egress.tolist() == [[[1, 0, 0, 0]]]
    assert rows.rank_ingress.tolist() == [[[0, 1, 0, 0]]]
    assert rows.node_egress.tolist() == [[[2, 0]]]
    assert rows.node_ingress.tolist() == [[[0, 2]]]
    rows = tally(trace, placement, wire=WIRES[0], homes=Homes.UNIFORM)
    # Of four homes, 0 and 1 send two rows to node 1, 2 and 3 one to node 0.
    assert rows.node_ingress.tolist() == [[[0.5, 1]]]
    assert rows.rank_ingress.tolist() == [[[0, 0.25, 0.25, 0.25]]]


@pytest.mark.parametrize(("per_node", "slow_nodes"), MACHINES)
@pytest.mark.parametrize("homes", Homes)
@pytest.mark.parametrize("wire", WIRES)
def test_optima_bounds_and_plans_agree(rng, wire, homes, per_node, slow_nodes):
    layers = 1 if homes is Homes.FOLLOW else 2
    problem = problem_of(rng, wire, homes, 5, per_node, layers, slow_nodes)
    truth = oracle(problem).value
    solution = get_solver("exact").solve(problem, ONE)
    assert solution.value == pytest.approx(truth, rel=1e-9)
    bound = certify(
        problem, solution.placement, time_limit=600, threads=1, max_iterations=50
    )
    assert 0 < bound.lower_bound <= truth * (1 + 1e-9)
    plan = JointSolver(config=JointConfig(rounds=1)).solve(problem, ONE)
    assert plan.value >= truth * (1 - 1e-9)
    assert plan.value <= truth * 1.2


@pytest.mark.parametrize(("per_node", "slow_nodes"), MACHINES)
@pytest.mark.parametrize("wire", WIRES)
def test_a_program_proves_the_optimum(rng, wire, per_node, slow_nodes):
    problem = problem_of(rng, wire, Homes.UNIFORM, 8, per_node, 1, slow_nodes)
    exact = get_solver("exact").solve(problem, ONE)
    program = get_solver("ilp").solve(problem, ONE)
    assert program.status is SolveStatus.OPTIMAL
    assert program.value == pytest.approx(exact.value, rel=1e-6)
