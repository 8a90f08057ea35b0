import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from moetuner.errors import (
    InvalidPlacementError,
    InvalidProblemError,
    MissingStatisticsError,
)
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.reference import tally_routing
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from strategies import placement_problems, problem_of_counts

# 1000 bytes per row, 100 B/s inside a node, 10 B/s between nodes.
SLOW = replace(HARDWARE["h100"], rank_bandwidth=100.0, nic_bandwidth=10.0)
SHAPE = ModelShape(hidden_size=500, expert_hidden_size=1, dispatch_bytes=2)


def by_hand(objective, load, transitions, ranks_per_node=1, **options):
    return problem_of_counts(
        load,
        Topology(num_ranks=2, ranks_per_node=ranks_per_node),
        transitions=transitions,
        objective=objective,
        cost=CostModel(hardware=SLOW, shape=SHAPE),
        **options,
    )


def put(problem, rank_of, **options):
    return Placement.from_rank_of(
        np.array(rank_of),
        layer_ids=problem.statistics.layer_ids,
        topology=problem.topology,
        **options,
    )


LOAD = [[4, 3, 2, 1], [0, 0, 0, 0]]
FLOW = [[[1, 2, 3, 4], [0, 0, 0, 5], [6, 0, 0, 0], [0, 0, 0, 7]]]
# Rank loads 4 + 2 and 3 + 1 with mean 5; the second layer is idle.
# Flows from {0, 2} to {0, 1}: 1 + 2 + 6 = 9, to {2, 3}: 7; from {1, 3}: 0 and 12.
RANK_OF = [[0, 1, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("objective", "ranks_per_node", "expected"),
    [
        (Objective.MAX_LOAD, 1, (6 / 5 + 0) / 2),
        (Objective.LOAD_DEVIATION, 1, (2 / 5 + 0) / 2),
        (Objective.LINK_TRAFFIC, 1, 7 * 1000 / 10),
        (Objective.LINK_TRAFFIC, 2, 7 * 1000 / 100),
        (Objective.TOTAL_TRAFFIC, 1, 7 / 28),
    ],
)
def test_objectives_of_an_instance_worked_out_by_hand(
    objective, ranks_per_node, expected
):
    problem = by_hand(objective, LOAD, FLOW, ranks_per_node)
    assert problem.objective_value(put(problem, RANK_OF)) == pytest.approx(expected)


def slow_time(problem, placement):
    """Mean over batches of their time, from the readable twin's rows."""
    (trace,), (batches,) = problem.workload.traces, problem.workload.batches
    cost, topology = problem.workload.cost, problem.topology
    hardware, shape = cost.hardware, cost.shape
    rows = tally_routing(
        trace, placement, cost.wire, cost.homes, cost.replica_rule, batches
    )
    scale, times = topology.num_ranks, []
    for batch in range(len(rows["slot_rows"])):
        for layer in range(problem.num_layers):
            slots = rows["slot_rows"][batch, layer].reshape(topology.num_ranks, -1)
            times.append(
                max(
                    max(
                        on.sum() / scale * shape.flops_per_row / hardware.matmul_rate,
                        (on > 0).sum() * shape.expert_bytes / hardware.memory_bandwidth,
                    )
                    for on in slots
                )
            )
            for way in ("", "return_"):
                rank, node = (
                    max(
                        rows[f"{way}{kind}_{end}"][batch, layer].max() / scale
                        for end in ("egress", "ingress")
                    )
                    for kind in ("rank", "node")
                )
                nics = hardware.nic_bandwidth * topology.ranks_per_node
                moved = max(rank / hardware.rank_bandwidth, node / nics)
                times.append(moved * shape.hidden_size * 2)
                if node or rank:
                    times.append(
                        hardware.node_latency if node else hardware.rank_latency
                    )
    return sum(times) / len(rows["slot_rows"])


def slow_objective(problem, rank_of):
    """Every objective as a loop over layers, ranks and pairs of experts."""
    num_layers, num_experts = rank_of.shape
    if problem.objective is Objective.MODELLED_TIME:
        return slow_time(problem, put(problem, rank_of))
    ranks = range(problem.topology.num_ranks)
    load = problem.statistics.load
    if problem.objective in (Objective.MAX_LOAD, Objective.LOAD_DEVIATION):
        total = 0.0
        for layer in range(num_layers):
            mean = load[layer].sum() / len(ranks)
            if mean == 0:
                continue
            on = [load[layer][rank_of[layer] == g].sum() for g in ranks]
            if problem.objective is Objective.MAX_LOAD:
                total += max(on) / mean
            else:
                total += sum(abs(rows - mean) for rows in on) / mean
        return total / num_layers
    node = [g // problem.topology.ranks_per_node for g in ranks]
    cost = problem.workload.cost
    row_bytes = cost.shape.hidden_size * cost.shape.dispatch_bytes
    slowest, moved, everything = 0.0, 0, 0
    for layer in range(num_layers - 1):
        rows = {}
        for a in range(num_experts):
            for b in range(num_experts):
                ends = int(rank_of[layer, a]), int(rank_of[layer + 1, b])
                flow = int(problem.statistics.transitions[layer, a, b])
                rows[ends] = rows.get(ends, 0) + flow
        seconds = [0.0]
        for (g, h), count in rows.items():
            everything += count
            if g == h:
                continue
            moved += count
            same = node[g] == node[h]
            hardware = cost.hardware
            speed = hardware.rank_bandwidth if same else hardware.nic_bandwidth
            seconds.append(count * row_bytes / speed)
        slowest += max(seconds)
    if problem.objective is Objective.LINK_TRAFFIC:
        return slowest
    return moved / everything if everything else 0.0


@given(placement_problems(max_experts=7, max_layers=4))
def test_objectives_equal_the_slow_twin(case):
    problem, rng = case
    rank_of = rng.permuted(
        np.tile(
            np.arange(problem.num_experts) % problem.topology.num_ranks,
            (problem.num_layers, 1),
        ),
        axis=1,
    )
    for objective in Objective:
        asked = replace(problem, objective=objective)
        value = asked.objective_value(put(asked, rank_of))
        assert value == pytest.approx(slow_objective(asked, rank_of), rel=1e-12)


def test_slots_are_just_enough_unless_given():
    three = by_hand(Objective.MAX_LOAD, [[1, 1, 1, 1, 1]], np.zeros((0, 5, 5)))
    assert three.slots_per_rank == 3
    assert replace(three, slots_per_rank=4).slots_per_rank == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_rank": 1}, "2 ranks x 1 slot cannot hold 4 experts"),
        ({"slots_per_rank": -2}, "2 ranks x -2 slots cannot hold 4 experts"),
        ({"slots_per_rank": math.nan}, "slots_per_rank must be a whole number"),
        ({"slots_per_rank": 2.0}, "slots_per_rank must be a whole number, got 2.0"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(InvalidProblemError, match=message):
        by_hand(Objective.MAX_LOAD, LOAD, FLOW, **options)


def test_an_objective_may_be_given_by_name():
    problem = by_hand("max-load", LOAD, FLOW)
    assert problem.objective is Objective.MAX_LOAD
    with pytest.raises(InvalidProblemError, match=r"one of max-load, .*got 'speed'"):
        by_hand("speed", LOAD, FLOW)


def test_fewer_experts_than_ranks_are_refused():
    with pytest.raises(InvalidProblemError, match="2 ranks but only 1 experts"):
        by_hand(Objective.MAX_LOAD, [[5]], np.zeros((0, 1, 1)))


@pytest.mark.parametrize("objective", [Objective.LINK_TRAFFIC, Objective.TOTAL_TRAFFIC])
def test_traffic_needs_transitions_loads_do_not(objective):
    problem = by_hand(objective, LOAD, FLOW)
    counted = replace(problem.statistics, transitions=None)
    problem = replace(problem, statistics=counted)
    with pytest.raises(
        MissingStatisticsError, match=f"{objective.value} needs layer-to-layer"
    ):
        problem.objective_value(put(problem, RANK_OF))
    balance = replace(problem, objective=Objective.MAX_LOAD)
    assert balance.objective_value(put(problem, RANK_OF)) == pytest.approx(0.6)


def test_a_placement_of_something_else_is_refused():
    problem = by_hand(Objective.MAX_LOAD, LOAD, FLOW)
    other = by_hand(Objective.MAX_LOAD, LOAD[:1], np.zeros((0, 4, 4)))
    with pytest.raises(InvalidPlacementError, match="does not answer the problem"):
        problem.objective_value(put(other, RANK_OF[:1]))
    with pytest.raises(InvalidPlacementError, match="does not answer the problem"):
        replace(problem, topology=Topology(num_ranks=2, ranks_per_node=2)).check(
            put(problem, RANK_OF)
        )


def test_sizes_that_break_the_problem_are_refused():
    problem = by_hand(Objective.MAX_LOAD, LOAD, FLOW)
    with pytest.raises(InvalidPlacementError, match="holds 3 experts on a rank"):
        problem.objective_value(put(problem, [[0, 0, 0, 1], [0, 0, 1, 1]]))
    wide = replace(problem, slots_per_rank=3)
    assert wide.objective_value(put(wide, [[0, 1, 1, 1], [0, 0, 1, 1]])) > 0


@pytest.mark.parametrize(
    ("slots", "spare", "replicas"), [(0, 1, False), (3, 1, False), (4, 3, True)]
)
def test_spare_slots_are_counted_over_all_ranks(slots, spare, replicas):
    """5 experts on 2 ranks leave a slot empty; only more than 3 a rank are a wish."""
    problem = by_hand(
        Objective.MAX_LOAD, [[1] * 5], np.zeros((0, 5, 5)), slots_per_rank=slots
    )
    assert (problem.spare_slots, problem.wants_replicas) == (spare, replicas)
