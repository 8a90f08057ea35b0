"""The second stage scored apart: what it says is what the evaluator says of homes."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.workload import BatchKind
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.request_affinity import assign_homes
from moetuner.planning.request_homes import RequestHomes, score_homes
from moetuner.trace import read_trace, split_by_sequence
from strategies import make_trace, random_ids, random_placement

MACHINE = Topology(num_ranks=4, ranks_per_node=2)


@pytest.fixture
def trace(rng):
    sequence = (np.arange(600) // 20).astype(np.int32)
    return make_trace(random_ids(rng, 600, 3, 16, 2), 16, sequence=sequence)


@pytest.mark.parametrize("known", [8, None])
def test_both_ways_are_the_evaluators_scores_of_recorded_homes(rng, trace, known):
    placement = random_placement(rng, trace, MACHINE)
    cost = CostModel()
    found = score_homes(
        trace, placement, cost, RequestHomes(known_tokens=known), batch_tokens=100
    )
    for tokens, score in ((0, found.by_length), (known, found.by_routing)):
        homed = assign_homes(
            trace, placement, cost, known_tokens=tokens, batch_tokens=100
        )
        recorded = replace(cost, homes=Homes.RECORDED)
        again = evaluate(homed, placement, recorded, batch_tokens=100)
        assert score.to_json() == again.to_json()
    one, other = found.by_length, found.by_routing
    assert found.gain == 1 - other.batch_seconds_mean / one.batch_seconds_mean
    faster = sum(other.batch_seconds < one.batch_seconds)
    assert found.batches_faster == faster == found.to_json()["batches_faster"]


def test_a_plan_scores_them_on_held_out_sequences_of_its_result(trace):
    known = RequestHomes(known_tokens=8)
    asked = PlanOptions(solver="lpt", request_homes=known, batch_tokens=100)
    report = plan_trace(trace, MACHINE, asked)
    again = score_homes(
        split_by_sequence(trace, 0.5, 0).score,
        report.result.placement,
        asked.cost,
        known,
        batch_tokens=100,
    )
    assert report.request_homes.to_json() == again.to_json()
    recorded = {
        c.name: c.placement.provenance.options["request_homes"]
        for c in report.candidates
    }
    assert recorded.pop("lpt") == 8
    assert set(recorded.values()) == {None}
    assert plan_trace(trace, MACHINE, PlanOptions(solver="lpt")).request_homes is None


def test_on_real_routing_hindsight_never_takes_longer_links(traces_dir):
    """The search by routing begins where lengths begin, and sees what it is scored on.

    Links only: computing does not depend on homes.
    """
    trace = read_trace(traces_dir / "deepseek-v2-lite-esft" / "law.npz")
    machine = Topology(num_ranks=8, ranks_per_node=4)
    asked = PlanOptions(solver="chain", request_homes=RequestHomes())
    found = plan_trace(trace, machine, asked).request_homes
    assert found.by_length.compute_seconds == found.by_routing.compute_seconds
    assert found.gain > -0.002  # two local optima of links; batches of one size
    assert found.by_routing.num_tokens == found.by_length.num_tokens


def test_what_has_no_sequences_is_refused_before_the_plan(trace):
    known = RequestHomes(known_tokens=8)
    kept = []
    for options, routing, error in (
        ({}, replace(trace, sequence=None), InvalidTraceError),
        ({"batch_kind": BatchKind.MIXED}, trace, InvalidProblemError),
    ):
        asked = PlanOptions(solver="lpt", request_homes=known, **options)
        with pytest.raises(error, match="request homes"):
            plan_trace(routing, MACHINE, asked, on_solved=kept.append)
    assert kept == []
    for wrong in (0, -1, 2.5, "8"):
        with pytest.raises(InvalidProblemError, match="known_tokens"):
            RequestHomes(known_tokens=wrong)
