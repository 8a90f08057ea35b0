"""EPLB against its published example, by hand, and its properties."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import SolverError
from moetuner.placement.model import EMPTY
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver import get_solver
from moetuner.solver.heuristics.eplb import (
    EplbConfig,
    EplbSolver,
    pack,
    rebalance,
    replicate,
)
from strategies import random_problem


def on_ranks(slots, num_ranks):
    return np.sort(slots.reshape(num_ranks, -1), axis=1).tolist()


def test_the_example_of_the_published_readme():
    """Two layers, 12 experts in 4 groups, 16 slots on 8 ranks of 2 nodes.

    The published answer, each rank's experts sorted.
    """
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for load, wanted in zip(loads, published, strict=True):
        slots = rebalance(
            np.array(load, float),
            num_groups=4,
            num_nodes=2,
            num_ranks=8,
            slots_per_rank=2,
        )
        assert on_ranks(slots, 8) == on_ranks(np.array(wanted), 8)


def test_packing_worked_out_by_hand():
    """9 and 8 open two packs, 5 joins the 8, 4 must join the 9: packs hold two each."""
    packs, sums = pack(np.array([4.0, 9.0, 5.0, 8.0]), 2)
    assert packs.tolist() == [0, 0, 1, 1]
    assert sums.tolist() == [13.0, 13.0]


def test_replication_worked_out_by_hand():
    """12 is halved to 6, then 7 to 3.5, then the halves of 12 become thirds."""
    experts, count = replicate(np.array([12.0, 7.0, 1.0]), 6, 4)
    assert experts.tolist() == [0, 1, 2, 0, 1, 0]
    assert count.tolist() == [3, 2, 1]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(4, 2), (4, 4), (6, 3), (2, 1)]),
    st.integers(0, 3),
    st.sampled_from([1, 2, 4]),
)
def test_replicas_are_legal_and_go_where_a_replica_carries_most(
    seed, shape, extra, num_groups
):
    rng = np.random.default_rng(seed)
    topology = Topology(num_ranks=shape[0], ranks_per_node=shape[1])
    problem = random_problem(rng, 2, 12, topology, objective=Objective.MODELLED_TIME)
    solver = EplbSolver(config=EplbConfig(num_groups=num_groups))
    assert not solver.solve(problem).placement.has_replicas
    wider = replace(problem, slots_per_rank=problem.slots_per_rank + extra)
    placement = solver.solve(wider).placement  # refuses two replicas on one rank
    wider.check(placement)
    hierarchical = num_groups % topology.num_nodes == 0
    ranks = topology.ranks_per_node if hierarchical else topology.num_ranks
    assert placement.has_replicas == (extra > 0 and ranks > 1)
    for row, load in zip(placement.slot_experts, problem.relative_load(), strict=True):
        nodes = row.reshape(topology.num_ranks // ranks, -1)
        for node in nodes:
            count = np.bincount(node[node >= 0], minlength=12)
            single, several = count == 1, count > 1
            if not several.any() or (node == EMPTY).any():
                continue
            # Before its last replica came, it carried more than any other does now.
            before = load[several] / (count[several] - 1)
            assert before.min() >= load[single].max(initial=0.0) - 1e-12


def test_groups_stay_on_one_node(rng):
    topology = Topology(num_ranks=4, ranks_per_node=2)
    problem = random_problem(rng, 3, 16, topology)
    placed = EplbSolver(config=EplbConfig(num_groups=4)).solve(problem).placement
    nodes = (placed.rank_of() // 2).reshape(3, 4, 4)
    assert (nodes == nodes[..., :1]).all()
    # One group cannot be shared by two nodes: then all ranks are packed as one.
    whole = EplbSolver(config=EplbConfig(num_groups=1)).solve(problem)
    assert whole.value <= EplbSolver(config=EplbConfig(num_groups=4)).solve(
        problem
    ).value * (1 + 1e-9)


def test_groups_that_do_not_divide_the_experts_are_refused(rng):
    problem = random_problem(rng, 1, 10, Topology(num_ranks=2, ranks_per_node=1))
    with pytest.raises(SolverError, match="num_groups must divide the 10 experts"):
        EplbSolver(config=EplbConfig(num_groups=4)).solve(problem)


def test_it_is_in_the_registry():
    assert isinstance(get_solver("eplb"), EplbSolver)
