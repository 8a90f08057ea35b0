"""A plan in use is weighed on tokens that neither it nor the new plan has seen."""

import dataclasses
import json

import numpy as np
import pytest
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.placement.topology import Topology
from moetuner.planning.drift import IN_USE, NEW, DriftOptions, measure_drift
from moetuner.planning.options import PlanOptions, Pricing
from moetuner.planning.plan import plan_trace
from moetuner.report.drift import drift_json, moves, then_and_now, verdict
from moetuner.solver import SolverOptions
from moetuner.trace import split_by_sequence
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)
# Rows decide, not weights or links: balance is worth a lot.
HARDWARE_OF_ROWS = dataclasses.replace(HARDWARE["h100"], matmul_rate=1e11)
COST = CostModel(
    hardware=HARDWARE_OF_ROWS,
    shape=ModelShape(hidden_size=64, expert_hidden_size=8192),
)
PRICING = Pricing(cost=COST, batch_tokens=100)
QUICK = SolverOptions(time_limit=0.5, threads=1)


def recorded(seed, *, skew=1.5, sequences=40):
    """2,000 tokens whose popular experts depend on the seed."""
    ids = random_ids(np.random.default_rng(seed), 2000, 3, 16, 2, skew=skew)
    sequence = np.arange(2000) * sequences // 2000
    return make_trace(ids, 16, sequence=sequence.astype(np.int32))


@pytest.fixture(scope="module")
def old():
    """Planned on traffic that has passed."""
    return plan_trace(
        recorded(1),
        MACHINE,
        PlanOptions(
            solver="joint",
            solver_options=QUICK,
            baselines="none",
            cost=PRICING.cost,
            batch_tokens=PRICING.batch_tokens,
        ),
    ).result.placement


def weighed(old, trace, recording=None, **options):
    asked = DriftOptions(pricing=PRICING, solver_options=QUICK, **options)
    return measure_drift(old, trace, asked, recording=recording)


@pytest.fixture(scope="module")
def drifted(old):
    """Other experts are popular now."""
    return weighed(old, recorded(2), recorded(1))


def test_other_traffic_calls_for_another_plan(drifted):
    assert drifted.gain.low > 0.02
    assert drifted.pays
    assert drifted.moved.num_moved > 0
    assert verdict(drifted).startswith("Re-plan: a new plan saves ")


def test_scores_are_of_the_half_that_the_new_plan_has_not_seen(old, drifted):
    held_out = split_by_sequence(recorded(2), 0.5, 0).score
    for scored in (drifted.in_use, drifted.comparison.result):
        own = evaluate(held_out, scored.placement, PRICING.cost, batch_tokens=100)
        assert own.to_json() == scored.evaluation.to_json()
    assert drifted.in_use.placement is old
    assert drifted.comparison.plan_tokens == drifted.comparison.score_tokens == 1000
    names = [each.name for each in drifted.comparison.candidates]
    assert (names[0], names[-1]) == (IN_USE, NEW)
    assert {"contiguous", "lpt", "eplb"} < set(names)


def test_moves_pay_after_their_time_over_what_a_batch_saves(drifted):
    saved = drifted.saved_seconds
    new = drifted.comparison.result.evaluation.batch_seconds_mean
    assert saved == drifted.in_use.evaluation.batch_seconds_mean - new > 0
    assert drifted.steps_to_pay - 1 < drifted.move_seconds / saved
    assert drifted.steps_to_pay >= drifted.move_seconds / saved
    assert f"{drifted.moved.num_moved} of 48 experts" in moves(drifted)


def test_its_own_recording_tells_what_the_plan_gained_then(old, drifted):
    before = drifted.before
    own = split_by_sequence(recorded(1), 0.5, 0).score
    then = evaluate(own, old, PRICING.cost, batch_tokens=100)
    assert before.batch_seconds == then.batch_seconds_mean
    assert before.held_out
    blocks = drifted.comparison.candidates[1]
    assert blocks.name == "contiguous"
    seconds = [
        evaluate(own, each, PRICING.cost, batch_tokens=100).batch_seconds_mean
        for each in (old, blocks.placement)
    ]
    assert before.gain == pytest.approx(1 - seconds[0] / seconds[1], rel=1e-12)
    times = [each.evaluation.batch_seconds_mean for each in (drifted.in_use, blocks)]
    assert drift_json(drifted)["now"]["gain"] == 1 - times[0] / times[1]
    assert "held out of its own recording" in then_and_now(drifted)


def test_a_gain_below_the_threshold_keeps_the_plan(old):
    kept = weighed(old, recorded(2), threshold=0.9)
    assert kept.gain.low > 0.02
    assert not kept.pays
    assert "not surely more than 90.0%" in verdict(kept)
    assert json.loads(json.dumps(drift_json(kept)))["replan"] is False


def test_moves_that_do_not_pay_in_time_keep_the_plan(old):
    # A new plan that moves all it likes, judged by fewer steps than it was made for.
    found = weighed(old, recorded(2), steps=10**9)
    options = dataclasses.replace(found.options, steps=1)
    judged = dataclasses.replace(found, options=options, move_seconds=1e3)
    assert judged.clears_threshold
    assert not judged.pays
    assert "its moves pay only after" in verdict(judged)
    assert "more than --steps 1." in verdict(judged)


def test_the_dearer_a_move_the_fewer_are_made(old):
    slow = dataclasses.replace(HARDWARE_OF_ROWS, rank_bandwidth=1e6, nic_bandwidth=1e6)
    cost = dataclasses.replace(PRICING.cost, hardware=slow)
    dear = DriftOptions(
        pricing=dataclasses.replace(PRICING, cost=cost),
        solver_options=QUICK,
        steps=1,
    )
    kept = measure_drift(old, recorded(2), dear)
    assert kept.moved.num_moved == 0
    assert kept.steps_to_pay == 0
    assert not kept.pays
    assert "no new plan was found that saves its moves" in verdict(kept)


def test_more_of_the_same_traffic_keeps_the_plan(old):
    ids = random_ids(np.random.default_rng(1), 4000, 3, 16, 2, skew=1.5)
    sequence = (np.arange(4000) * 80 // 4000).astype(np.int32)
    first = make_trace(ids[:2000], 16, sequence=sequence[:2000])
    later = make_trace(ids[2000:], 16, sequence=sequence[2000:] - 40)
    plan = plan_trace(
        first,
        MACHINE,
        PlanOptions(solver_options=QUICK, cost=PRICING.cost, batch_tokens=100),
    ).result.placement
    found = weighed(plan, later)
    assert not found.pays
    assert verdict(found).startswith("Keep the plan in use: ")


def test_on_its_own_recording_the_parts_are_those_of_the_plan(old):
    found = weighed(old, recorded(1), plan_fraction=0.9)
    assert found.same_recording
    assert found.comparison.score_tokens == 1000
    assert not found.pays


def test_without_a_recording_the_files_own_value_is_told(old):
    found = weighed(old, recorded(2))
    assert found.before.batch_seconds == old.provenance.value
    assert found.before.gain is None
    assert "on the tokens that it was planned on" in then_and_now(found)


def test_of_other_prices_or_an_engines_file_nothing_is_told(old):
    bare = dataclasses.replace(
        old, provenance=dataclasses.replace(old.provenance, value=None)
    )
    other = dataclasses.replace(PRICING, batch_tokens=50)
    asked = DriftOptions(pricing=other, solver_options=QUICK)
    for found in (weighed(bare, recorded(2)), measure_drift(old, recorded(2), asked)):
        assert found.before is None
        assert "does not say what it cost before" in then_and_now(found)


def test_a_single_sequence_claims_nothing(old):
    found = weighed(old, recorded(2, sequences=1))
    assert found.gain is None
    assert not found.pays
    assert "nothing was held out" in verdict(found)
    assert drift_json(found)["held_out"] is False


def test_replicas_in_use_keep_their_slots():
    trace = recorded(1)
    wide = plan_trace(
        trace,
        MACHINE,
        PlanOptions(
            solver="eplb",
            solver_options=QUICK,
            slots_per_rank=5,
            cost=PRICING.cost,
            batch_tokens=100,
        ),
    ).result.placement
    assert wide.has_replicas
    found = weighed(wide, recorded(2))
    new = found.comparison.result
    assert new.placement.slots_per_rank == 5
    assert (
        new.evaluation.batch_seconds_mean < found.in_use.evaluation.batch_seconds_mean
    )


def test_what_does_not_belong_together_is_refused(old):
    other_model = make_trace(random_ids(np.random.default_rng(0), 200, 2, 16, 2), 16)
    with pytest.raises(InvalidPlacementError, match="is for another model"):
        weighed(old, other_model)
    with pytest.raises(InvalidPlacementError, match="not planned on the given rec"):
        weighed(old, recorded(2), recorded(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold must be in"),
        ({"threshold": -0.1}, "threshold must be in"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"steps": 0}, "steps must be a whole number > 0"),
        ({"steps": 1.5}, "steps must be a whole number > 0"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidProblemError, match=message):
        DriftOptions(**options)
