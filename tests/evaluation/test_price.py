"""The price of a layer, and the rules of wires, on both sides of the border."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner import _core
from moetuner.evaluation import reference
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE, Hardware
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.rates import Bandwidth
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.evaluation.tally import tally
from moetuner.evaluation.workload import price
from moetuner.placement.topology import Topology
from strategies import TOY_COST, machines, random_placement, topologies, traces

SIZES = {"hidden_size": 4, "expert_hidden_size": 1}
positive = st.floats(1e-3, 1e3)


@st.composite
def costs(draw, topology):
    """A machine and a model where now compute, now links, now latencies are slow."""
    hardware = Hardware(
        name="any",
        **{
            name: draw(positive)
            for name in (
                "memory_bandwidth",
                "matmul_rate",
                "rank_bandwidth",
                "nic_bandwidth",
            )
        },
        rank_latency=draw(st.sampled_from([0.0, 0.5, 20.0])),
        node_latency=draw(st.sampled_from([0.0, 1.0, 50.0])),
    )
    shape = ModelShape(
        hidden_size=draw(st.integers(1, 9)),
        expert_hidden_size=draw(st.integers(1, 9)),
        dispatch_bytes=draw(st.sampled_from([1, 1.0625, 2])),
        combine_bytes=draw(st.sampled_from([1, 2])),
    )
    num_ranks = topology.num_ranks
    speeds = st.lists(st.floats(0.1, 2.0), min_size=num_ranks, max_size=num_ranks)
    return CostModel(
        hardware=draw(machines(hardware, topology)),
        shape=shape,
        wire=draw(st.sampled_from(Wire)),
        homes=draw(st.sampled_from([Homes.UNIFORM, Homes.FOLLOW])),
        rank_speeds=tuple(draw(st.one_of(st.just([]), speeds))),
    )


@given(st.data(), traces(), topologies, st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_the_price_equals_the_readable_twin(data, trace, topology, extra, seed):
    cost = data.draw(costs(topology))
    placement = random_placement(np.random.default_rng(seed), trace, topology, extra)
    rows = tally(
        trace, placement, wire=cost.wire, homes=cost.homes, groups=trace.sequence
    )
    found = price(rows, cost)
    parts = [found.compute, found.dispatch, found.combine, found.layer]
    expected = reference.layer_seconds(rows, cost)
    np.testing.assert_allclose(np.stack(parts, axis=2), expected, rtol=1e-12)


@given(positive, positive, st.integers(0, 50), st.integers(0, 50))
def test_the_planes_of_computing_are_its_largest(row, expert, rows, active):
    compute = _core.ComputeRates(row=row, expert=expert)
    link = _core.LinkRates(rank_row=0, node_row=0, rank_latency=0, node_latency=0)
    layer_price = _core.LayerPrice(
        _core.Rates(
            compute=compute,
            dispatch=link,
            combine=link,
            both_ways=link,
            dispatch_share=0.5,
            rank_speeds=[1.0],
            rank_links=_core.LinkFactors(),
            node_links=_core.LinkFactors(),
        )
    )
    planes = layer_price.busy_planes
    highest = max(rows * plane.row + active * plane.expert for plane in planes)
    assert layer_price.busy(rows, active) == highest
    assert layer_price.compute([rows], [active]) == highest


def test_rates_have_the_names_of_what_they_are():
    hardware, shape = (
        HARDWARE["h100"],
        ModelShape(
            hidden_size=1000, expert_hidden_size=10, dispatch_bytes=1, combine_bytes=3
        ),
    )
    cost = CostModel(hardware=hardware, shape=shape, rank_speeds=(1, 0.5, 1, 2))
    rates = cost.rates(Topology(num_ranks=4, ranks_per_node=2))
    assert rates.compute.row == shape.flops_per_row / hardware.matmul_rate
    assert rates.compute.expert == shape.expert_bytes / hardware.memory_bandwidth
    for link, size, messages in (
        (rates.dispatch, 1000, 1),
        (rates.combine, 3000, 1),
        (rates.both_ways, 4000, 2),
    ):
        assert link.rank_row == size / hardware.rank_bandwidth
        assert link.node_row == size / (2 * hardware.nic_bandwidth)
        assert link.rank_latency == messages * hardware.rank_latency
        assert link.node_latency == messages * hardware.node_latency
    assert rates.dispatch_share == 0.25
    assert rates.rank_speeds == [1, 0.5, 1, 2]


def test_links_that_differ_are_beside_the_slowest_one():
    hardware = replace(
        HARDWARE["h100"],
        rank_bandwidth=Bandwidth(egress=(4.0,), ingress=(4.0, 2.0)),
        nic_bandwidth=Bandwidth(egress=(1.0,), ingress=(1.0, 0.5)),
    )
    topology = Topology(num_ranks=4, ranks_per_node=2)
    cost = CostModel(hardware=hardware, shape=ModelShape(**SIZES))
    rates = cost.rates(topology)
    assert rates.dispatch.rank_row == 8 / 2
    assert rates.dispatch.node_row == 8 / (2 * 0.5)
    assert rates.rank_links.egress == [0.5] * 4
    assert rates.rank_links.ingress == [0.5, 1, 0.5, 1]
    assert rates.node_links.egress == [0.5, 0.5]
    assert rates.node_links.ingress == [0.5, 1]
    price = cost.layer_price(topology)
    # Rank 0 sends ten rows, as slow as five into rank 1.
    assert price.busiest_rank([10, 0, 0, 0], [0, 4, 0, 0]) == 5
    assert price.busiest_rank([[0] * 4] * 2, [[9, 4, 0, 0], [9, 5, 0, 0]]).tolist() == [
        4.5,
        5,
    ]
    assert price.busiest_node([3, 0], [0, 3]) == 3
    assert not cost.alike(topology)
    both = replace(hardware, nic_bandwidth=1.0, rank_bandwidth=4.0)
    assert replace(cost, hardware=both).alike(topology)
    ways = replace(both, rank_bandwidth=Bandwidth(egress=(4.0,), ingress=(2.0,)))
    assert replace(cost, hardware=ways).alike(topology)
    assert not replace(cost, rank_speeds=(1, 1, 1, 0.5)).alike(topology)


def test_nodes_in_the_place_of_ranks_are_faster_and_move_nothing_inside():
    topology = Topology(num_ranks=4, ranks_per_node=2)
    rates = TOY_COST.rates(topology)
    nodes = rates.of_nodes([1.0, 0.5])
    assert nodes.compute.row == rates.compute.row / 2
    assert nodes.compute.expert == rates.compute.expert / 2
    assert nodes.rank_speeds == [1.0, 0.5]
    for name in ("dispatch", "combine", "both_ways"):
        of_ranks, of_nodes = getattr(rates, name), getattr(nodes, name)
        assert (of_nodes.rank_row, of_nodes.rank_latency) == (0, 0)
        assert of_nodes.node_row == of_ranks.node_row
        assert of_nodes.node_latency == of_ranks.node_latency


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.compute([[1, 2]], [1, 2]), r"must have one shape, got \[1, 2\]"),
        (lambda p: p.compute([1, 2, 3], [1, 2, 3]), r"must be \[..., 2 ranks\]"),
        (lambda p: p.exchange(p.rates.dispatch, [1], [[1]]), "must have one shape"),
        (lambda p: p.busiest_rank([1, 2], [1]), "must have one shape"),
        (lambda p: p.busiest_rank([], []), "wanted rows of all places"),
        (
            lambda _: _core.LinkFactors(egress=[1.0], ingress=[1.0, 1.0]),
            "as many places, got 1 and 2",
        ),
        (
            lambda _: _core.LinkFactors(egress=[1.0], ingress=[1.5]),
            r"must be in \(0, 1\], got 1.5",
        ),
        (lambda p: p.rates.of_nodes([]), "must name the speed of each rank"),
        (lambda p: p.rates.of_nodes([1, 1, 1]), "that divides the 2 ranks, got 3"),
        (lambda p: p.rates.of_nodes([0.0]), "must be > 0"),
        (lambda _: _core.ComputeRates(row=-1, expert=0), "row must be >= 0 s, got -1"),
    ],
)
def test_prices_of_other_shapes_are_refused(call, message):
    layer_price = TOY_COST.layer_price(Topology(num_ranks=2, ranks_per_node=2))
    with pytest.raises(ValueError, match=message):
        call(layer_price)


def test_the_core_knows_every_wire_and_no_other():
    rules = {
        wire.value: (
            wire.rules.rows.name,
            wire.rules.crossing.name,
            wire.rules.hops.name,
        )
        for wire in Wire
    }
    assert rules == {
        "dedup": ("PER_RANK", "GATEWAY", "IN_TURN"),
        "dedup_pipelined": ("PER_RANK", "GATEWAY", "TOGETHER"),
        "dedup_ranks": ("PER_RANK", "DIRECT", "TOGETHER"),
        "per_expert": ("PER_EXPERT", "DIRECT", "TOGETHER"),
        "allgather": ("TO_ALL", "RING", "TOGETHER"),
    }
    with pytest.raises(ValueError, match=r"wanted one of dedup, .*got smoke"):
        _core.wire_rules("smoke")


@pytest.mark.parametrize("homes", Homes)
@pytest.mark.parametrize("rule", ReplicaRule)
def test_the_core_knows_all_homes_and_rules(homes, rule):
    """The tally takes each by its name; one that it did not know would be refused."""
    topology = Topology(num_ranks=2, ranks_per_node=2)
    ids = np.zeros((3, 1, 1), np.int16)
    static = rule is ReplicaRule.SGLANG_STATIC
    counted = _core.tally_routing(
        ids,
        np.array([[0, 1]], np.int32),
        2,
        topology.num_ranks,
        topology.ranks_per_node,
        TOY_COST.wire.rules,
        homes,
        rule,
        np.array([[[0, 1]] * 2], np.int32) if static else None,
        np.ones(3, np.int16),
        np.zeros(3, np.int32),
        1,
    )
    scale = 1 if homes is Homes.RECORDED else 2
    assert counted["scale"] == scale
    assert counted["slot_rows"].tolist() == [[[3 * scale, 0]]]
