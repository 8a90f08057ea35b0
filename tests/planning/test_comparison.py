"""Placements are scored on what none of them was planned on, whoever made them."""

import dataclasses

import numpy as np
import pytest
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.cost import CostModel
from moetuner.placement.topology import Topology
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.solver import SolverOptions
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)


@pytest.fixture(scope="module")
def trace():
    ids = random_ids(np.random.default_rng(3), 1000, 3, 16, 2)
    return make_trace(ids, 16, sequence=(np.arange(1000) // 20).astype(np.int32))


def plan(trace, *, seed=0, topology=MACHINE, fraction=0.5, solver="chain"):
    options = SolverOptions(time_limit=1, seed=seed)
    return plan_trace(
        trace,
        topology,
        PlanOptions(solver=solver, solver_options=options, plan_fraction=fraction),
    )


def without_origin(placement):
    return dataclasses.replace(
        placement, provenance=dataclasses.replace(placement.provenance, trace_sha256="")
    )


def test_a_placement_file_tells_the_same_as_the_plan_that_wrote_it(trace):
    of_plan = plan(trace, seed=5, fraction=0.3)
    of_file = compare_placements(
        trace, {"chain": of_plan.result.placement}, of_plan.cost, seed=5
    )
    assert [c.name for c in of_file.candidates] == [c.name for c in of_plan.candidates]
    assert of_file.plan_tokens == of_plan.plan_tokens == 300
    assert of_file.score_tokens == of_plan.score_tokens == 700
    for one, other in zip(of_file.candidates, of_plan.candidates, strict=True):
        assert one.evaluation.to_json() == other.evaluation.to_json()
        assert one.gain == other.gain
    np.testing.assert_array_equal(of_file.statistics.load, of_plan.statistics.load)
    assert of_file.held_out
    assert of_plan.held_out


def test_of_another_trace_every_token_is_scored_beside_what_needs_no_planning(trace):
    other = make_trace(np.array(trace.topk_ids[::-1]), 16, sequence=trace.sequence)
    placement = plan(other).result.placement
    found = compare_placements(trace, {"mine": placement}, CostModel())
    assert found.held_out
    assert (found.plan_tokens, found.score_tokens) == (0, 1000)
    assert [c.name for c in found.candidates] == ["contiguous", "random", "mine"]


def test_of_unknown_origin_nothing_is_called_held_out(trace):
    placement = without_origin(plan(trace).result.placement)
    found = compare_placements(trace, {"mine": placement}, CostModel())
    assert not found.held_out
    assert found.score_tokens == 1000


def test_gains_are_measured_against_the_placement_in_use(trace):
    old, new = plan(trace, solver="random"), plan(trace)
    pair = {"new": new.result.placement, "old": old.result.placement}
    found = compare_placements(trace, pair, new.cost, before="old")
    assert found.baseline.name == "old"
    assert found.baseline.gain is None
    assert found.result.name == "new"
    seconds = {c.name: c.evaluation.batch_seconds_mean for c in found.candidates}
    gain = 1 - seconds["new"] / seconds["old"]
    assert found.result.gain.gain == pytest.approx(gain, rel=1e-12)


def test_placements_of_different_splits_or_machines_are_refused(trace):
    one, other = plan(trace, seed=1), plan(trace, seed=2)
    pair = {"one": one.result.placement, "other": other.result.placement}
    with pytest.raises(InvalidPlacementError, match="one and other were planned on"):
        compare_placements(trace, pair, CostModel())
    small = plan(trace, topology=Topology(num_ranks=2, ranks_per_node=2))
    pair = {"one": one.result.placement, "small": small.result.placement}
    with pytest.raises(InvalidPlacementError, match="small: for 2 ranks"):
        compare_placements(trace, pair, CostModel())


def test_a_placement_of_another_model_is_named(trace):
    """Also where its machine would be too large for the model of the trace."""
    own = plan(trace).result.placement
    ids = random_ids(np.random.default_rng(0), 100, 3, 64, 2)
    large = make_trace(ids, 64, sequence=(np.arange(100) // 20).astype(np.int32))
    other = plan(large, topology=Topology(num_ranks=32, ranks_per_node=4), solver="lpt")
    for placements in (
        {"theirs": other.result.placement},
        {"theirs": other.result.placement, "own": own},
    ):
        with pytest.raises(InvalidPlacementError, match="theirs: placement is for ano"):
            compare_placements(trace, placements, CostModel())


@pytest.mark.parametrize("options", [{}, {"plan_fraction": "0.5", "seed": 0}])
def test_a_planned_part_that_nobody_knows_is_not_guessed(trace, options):
    placement = plan(trace).result.placement
    origin = dataclasses.replace(placement.provenance, options=options)
    placement = dataclasses.replace(placement, provenance=origin)
    with pytest.raises(InvalidPlacementError, match="does not say on which part"):
        compare_placements(trace, {"mine": placement}, CostModel())


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_what_was_planned_on_every_token_is_in_sample_in_the_file_too(trace, fraction):
    """One sequence cannot be split; a share of 1 holds nothing out."""
    one = trace
    if fraction < 1:
        one = dataclasses.replace(trace, sequence=np.zeros(1000, np.int32))
    of_plan = plan(one, fraction=fraction)
    of_file = compare_placements(one, {"it": of_plan.result.placement}, of_plan.cost)
    for found in (of_plan, of_file):
        assert found.in_sample
        assert not found.held_out
        assert (found.plan_tokens, found.score_tokens) == (1000, 1000)
    of_another = compare_placements(
        dataclasses.replace(trace, topk_ids=trace.topk_ids[::-1].copy()),
        {"it": of_plan.result.placement},
        of_plan.cost,
    )
    assert of_another.held_out
