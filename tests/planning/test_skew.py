"""What is uneven for good, what only in a batch, and what is chance."""

import dataclasses
import json

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel, Wire
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.workload import BatchKind, Workload
from moetuner.placement.topology import Topology
from moetuner.planning.skew import default_ranks, measure_skew
from moetuner.problem import Objective, PlacementProblem
from moetuner.report.skew import skew_table, skew_words
from moetuner.solver import get_solver
from moetuner.trace import CountTrace
from strategies import make_trace, random_ids

PARTS = (
    "persistent",
    "persistent_chance",
    "left",
    "blocks",
    "transient",
    "transient_chance",
)


def of_ids(ids, experts, per_sequence):
    sequence = (np.arange(len(ids)) // per_sequence).astype(np.int32)
    return make_trace(ids, experts, sequence=sequence)


def test_hand_counted():
    """Two batches of four tokens on two ranks; experts 0 and 1 take turns."""
    ids = np.array([0, 0, 0, 2, 1, 1, 1, 3], np.int16)[:, None, None]
    skew = measure_skew(of_ids(ids, 4, 4), 2, batch_tokens=4)
    assert skew.num_batches == 2
    # Blocks: experts 0 and 1 share rank 0, six of eight tokens, three of four each.
    assert skew.persistent.tolist() == [1.5]
    assert skew.blocks.tolist() == [1.5]
    # Balanced over all: 0 and 1 on different ranks. In a batch that helps little: one
    # rank has three, or all four where the other expert of the batch is beside it.
    assert skew.left.tolist() == [1.0]
    assert skew.transient[0] in (1.5, 2.0)
    # Four fair draws: the fuller side has on average 2.75 of 4.
    assert skew.transient_chance[0] == pytest.approx(2.75 / 2, abs=0.03)


def test_a_uniform_router_shows_no_more_than_chance():
    rng = np.random.default_rng(5)
    ids = random_ids(rng, 20_000, 2, 16, 1, skew=0.0)
    skew = measure_skew(of_ids(ids, 16, 50), 8, batch_tokens=500)
    assert skew.num_batches == 40
    assert np.abs(skew.persistent - skew.persistent_chance).max() < 0.03
    error = np.abs(skew.transient - skew.transient_chance) / skew.chance_error
    assert error.max() < 4
    assert skew.changing == 0
    assert skew.transient.min() > 1.1  # a batch of 500 is uneven all the same
    assert "no more than expected" in skew_words(skew)


def test_skew_that_stays_can_be_removed_and_skew_that_moves_cannot():
    """One router favours the first block always, one another block in each batch."""
    rng = np.random.default_rng(6)
    stays = rng.integers(0, 4, 8000)
    moves = (rng.integers(0, 4, 8000) + 4 * (np.arange(8000) // 500)) % 16
    busy = rng.random(8000) < 0.5
    even = rng.integers(0, 16, 8000)
    found = {}
    for name, favoured in (("stays", stays), ("moves", moves)):
        ids = np.where(busy, favoured, even).astype(np.int16)[:, None, None]
        found[name] = measure_skew(of_ids(ids, 16, 500), 4, batch_tokens=500)
    assert found["stays"].persistent[0] == pytest.approx(2.5, abs=0.05)
    assert found["stays"].transient[0] < found["stays"].transient_chance[0] + 0.02
    assert found["stays"].removable > 0.9
    assert found["moves"].persistent[0] == pytest.approx(1.0, abs=0.05)
    gap = found["moves"].transient[0] - found["moves"].transient_chance[0]
    assert gap > 0.1
    assert "changes from batch to batch" in skew_words(found["moves"])


def test_it_is_the_evaluators_imbalance_of_the_same_placements():
    """The same numbers, counted by the core's tally."""
    trace = of_ids(random_ids(np.random.default_rng(2), 1200, 3, 16, 2), 16, 20)
    skew = measure_skew(trace, 4, batch_tokens=100)
    cost = CostModel(wire=Wire.ALLGATHER)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=cost),
        Topology(num_ranks=4, ranks_per_node=4),
        objective=Objective.MAX_LOAD,
    )
    for name, pooled in (("contiguous", skew.persistent), ("lpt", skew.left)):
        placement = get_solver(name).solve(problem).placement
        score = evaluate(trace, placement, cost)
        np.testing.assert_allclose(score.imbalance, pooled, rtol=1e-12)


def test_one_batch_is_all_tokens():
    trace = of_ids(random_ids(np.random.default_rng(2), 600, 3, 16, 2), 16, 20)
    skew = measure_skew(trace, 4, batch_tokens=0)
    assert skew.num_batches == 1
    np.testing.assert_array_equal(skew.blocks, skew.persistent)
    np.testing.assert_array_equal(skew.transient, skew.left)
    assert "With fewer than 10 batches" in skew_words(skew)


def test_counts_say_the_same_as_the_tokens_that_they_count():
    ids = random_ids(np.random.default_rng(3), 800, 2, 16, 2)
    trace = of_ids(ids, 16, 100)
    counts = np.zeros((8, 2, 16), np.int64)
    for group in range(8):
        for layer in range(2):
            chosen = ids[group * 100 : (group + 1) * 100, layer].ravel()
            counts[group, layer] = np.bincount(chosen, minlength=16)
    counted = CountTrace(
        counts=counts,
        num_tokens=np.full(8, 100),
        layer_ids=trace.layer_ids,
    )
    one, other = (measure_skew(t, 4, batch_tokens=200) for t in (trace, counted))
    for part in PARTS:
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


def test_an_expert_that_is_too_busy_for_its_rank_is_told():
    ids = np.zeros((1000, 1, 1), np.int16)
    ids[::2, 0, 0] = 1 + np.arange(500) % 15
    skew = measure_skew(of_ids(ids, 16, 50), 4, batch_tokens=100)
    assert skew.left[0] > 1.9
    assert "too busy for equal slots, which replicas can spread" in skew_words(skew)


def test_padding_and_idle_layers_count_nothing():
    ids = random_ids(np.random.default_rng(4), 400, 2, 16, 2)
    ids[:, 1] = -1
    skew = measure_skew(of_ids(ids, 16, 20), 4, batch_tokens=100)
    for part in PARTS:
        assert getattr(skew, part)[1] == 1.0
    assert skew.blocks[0] > 1


def test_shuffled_tokens_leave_only_chance():
    """Sequences about one topic peak together; tokens of all, as decode mixes them."""
    rng = np.random.default_rng(9)
    topic = np.repeat(rng.integers(0, 4, 80), 50)
    ids = ((rng.integers(0, 4, 4000) + 4 * topic) % 16).astype(np.int16)
    trace = of_ids(ids[:, None, None], 16, 50)
    whole = measure_skew(trace, 4, batch_tokens=200)
    mixed = measure_skew(trace, 4, batch_tokens=200, batch_kind=BatchKind.MIXED)
    assert whole.transient[0] > whole.transient_chance[0] + 0.1
    assert mixed.transient[0] == pytest.approx(mixed.transient_chance[0], abs=0.03)


def test_json_has_every_layer_and_the_table_fits():
    trace = of_ids(random_ids(np.random.default_rng(2), 600, 3, 16, 2), 16, 20)
    skew = measure_skew(trace, batch_tokens=50)
    told = json.loads(json.dumps(skew.to_json()))
    assert all(len(told[part]) == 3 for part in PARTS)
    assert 0 <= told["removable"] <= 1
    assert told["num_ranks"] == 8
    assert skew_table(skew).row_count == 3


@pytest.mark.parametrize(("experts", "ranks"), [(64, 8), (8, 4), (3, 1), (1, 1)])
def test_each_rank_has_two_experts_to_choose(experts, ranks):
    assert default_ranks(experts) == ranks


def test_one_rank_and_too_many():
    trace = of_ids(random_ids(np.random.default_rng(2), 100, 1, 4, 1), 4, 20)
    assert skew_words(measure_skew(trace, 1)) == "On one rank nothing is uneven."
    with pytest.raises(InvalidProblemError, match=r"num_ranks must be 1\.\.4"):
        measure_skew(trace, 5)
    with pytest.raises(InvalidProblemError, match="batch_tokens"):
        measure_skew(trace, 2, batch_tokens=-1)


def test_the_same_seed_draws_the_same():
    trace = of_ids(random_ids(np.random.default_rng(2), 600, 3, 16, 2), 16, 20)
    one, again, other = (measure_skew(trace, 4, seed=s) for s in (1, 1, 2))
    assert dataclasses.asdict(one).keys() == dataclasses.asdict(other).keys()
    np.testing.assert_array_equal(one.transient_chance, again.transient_chance)
    assert (one.transient_chance != other.transient_chance).any()
