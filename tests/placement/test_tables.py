"""Tables against the evaluator: the same slots and ranks for every token, exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.tally import tally
from moetuner.placement.model import Placement, contiguous_rank_of
from moetuner.placement.tables import PlacementTables, fingerprint
from moetuner.placement.topology import Topology
from moetuner.trace import read_trace, select
from strategies import make_trace, random_ids, random_placement, topologies, traces


def slots_by_tables(ids, tables):
    """[T, L, K] slot of each choice, -1 for padding: what `dispatch` does."""
    layer = np.arange(ids.shape[1])[None, :, None]
    expert = np.maximum(ids, 0)
    token = np.arange(len(ids))[:, None, None]
    turn = token % tables.num_candidates[layer, expert]
    return np.where(ids >= 0, tables.candidates[layer, expert, turn], -1)


def assert_equals_evaluator(trace, placement, rank):
    """`trace` holds the tokens of `rank` alone, so a token's index is its row."""
    tables = PlacementTables.of(placement, rank)
    own = make_trace(
        trace.topk_ids,
        trace.num_experts,
        home_rank=np.full(trace.num_tokens, rank, np.int16),
    )
    place = Placement(
        slot_experts=placement.slot_experts,
        layer_ids=own.layer_ids,
        num_experts=placement.num_experts,
        topology=placement.topology,
    )
    told = tally(own, place, homes=Homes.RECORDED)
    slots = slots_by_tables(own.topk_ids, tables)
    for layer in range(own.num_layers):
        here = slots[:, layer]
        counts = np.bincount(here[here >= 0], minlength=placement.num_slots)
        assert counts.tolist() == told.slot_rows[0, layer].tolist()
        ranks = np.where(here >= 0, here // tables.slots_per_rank, -1)
        to_each = [(ranks == g).any(axis=1).sum() for g in range(tables.num_ranks)]
        assert to_each == told.traffic[layer, rank].tolist()


@given(
    trace=traces(max_tokens=40),
    topology=topologies,
    extra_slots=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_slots_are_those_of_the_evaluator(trace, topology, extra_slots, seed):
    """With replicas, empty slots, nodes, padding."""
    placement = random_placement(
        np.random.default_rng(seed), trace, topology, extra_slots
    )
    for rank in range(topology.num_ranks):
        assert_equals_evaluator(trace, placement, rank)


@pytest.mark.parametrize(
    "name", ["gpt-oss-20b-fingerprinting/mmlu.npz", "deepseek-v2-lite-esft/law.npz"]
)
def test_slots_are_those_of_the_evaluator_on_real_routing(traces_dir, name, rng):
    """8 ranks on 2 nodes, one spare slot each, filled with replicas."""
    trace = read_trace(traces_dir / name)
    trace = select(trace, np.arange(trace.num_tokens) < 4000)
    topology = Topology(num_ranks=8, ranks_per_node=4)
    placement = random_placement(rng, trace, topology, extra_slots=1)
    assert placement.has_replicas
    for rank in (0, 3, 6):
        assert_equals_evaluator(trace, placement, rank)


def small(slots, num_experts=3, ranks=2, layers=(4,)):
    return Placement(
        slot_experts=np.array([slots] * len(layers), np.int32),
        layer_ids=np.array(layers, np.int32),
        num_experts=num_experts,
        topology=Topology(num_ranks=ranks, ranks_per_node=ranks),
    )


def test_every_rank_has_tables_of_one_shape_and_its_own_experts(rng):
    trace = make_trace(random_ids(rng, 4, 3, 9, 2), 9)
    topology = Topology(num_ranks=4, ranks_per_node=2)
    placement = random_placement(rng, trace, topology, extra_slots=2)
    tables = [PlacementTables.of(placement, rank) for rank in range(4)]
    assert len({t.candidates.shape for t in tables}) == 1
    assert {t.fingerprint for t in tables} == {fingerprint(placement)}
    whole = np.concatenate([t.local_experts for t in tables], axis=1)
    assert np.array_equal(whole, placement.slot_experts)
    assert all((t.num_candidates >= 1).all() for t in tables)


def test_a_contiguous_placement_is_the_identity():
    placement = Placement.from_rank_of(
        contiguous_rank_of(2, 8, 4),
        layer_ids=np.arange(2, dtype=np.int32),
        topology=Topology(num_ranks=4, ranks_per_node=4),
    )
    tables = PlacementTables.of(placement, 1)
    assert tables.candidates[..., 0].tolist() == [list(range(8))] * 2
    assert tables.local_experts.tolist() == [[2, 3]] * 2


def test_the_fingerprint_changes_with_all_that_moves_tokens():
    ways = [
        small([0, 1, 2, -1]),
        small([1, 0, 2, -1]),
        small([0, 1, 2, -1], layers=(5,)),
        small([0, 1, 2, -1], ranks=4),
        small([0, 1, 2, -1], ranks=1),
        small([0, 1, 2, 0]),
    ]
    assert len({fingerprint(placement) for placement in ways}) == len(ways)
    assert fingerprint(small([0, 1, 2, -1])) == fingerprint(ways[0])


def test_unknown_ranks_and_layers_are_refused():
    placement = small([0, 1, 2, -1])
    for rank in (-1, 2, 0.5):
        with pytest.raises(InvalidPlacementError, match=r"rank must be 0\.\.1"):
            PlacementTables.of(placement, rank)
    tables = PlacementTables.of(placement, 0)
    assert tables.row_of(4) == 0
    with pytest.raises(InvalidPlacementError, match=r"another model.*\[4\].*layer 3"):
        tables.row_of(3)
