"""What an engine's filling of empty slots costs is said with the plan."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.evaluation.workload import BatchKind
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.spare import spare_slots
from moetuner.solver import SolverOptions
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.scenarios import SearchProfile
from strategies import make_trace, random_ids

FOUR = Topology(num_ranks=4, ranks_per_node=4)


@pytest.fixture(scope="module")
def trace():
    ids = random_ids(np.random.default_rng(3), 800, 2, 16, 2)
    return make_trace(ids, 16, sequence=(np.arange(800) // 20).astype(np.int32))


def planned(trace, rule, slots, compute_bound=False):
    """In decode, weights are all that counts; or arithmetic does."""
    hardware = HARDWARE["h100"]
    if compute_bound:
        hardware = replace(hardware, matmul_rate=hardware.matmul_rate / 1e4)
    options = PlanOptions(
        config=JointConfig(rounds=1, profile=SearchProfile()),
        solver_options=SolverOptions(time_limit=1000, threads=1),
        cost=CostModel(
            hardware=hardware,
            shape=ModelShape(hidden_size=2048, expert_hidden_size=1408),
            replica_rule=rule,
        ),
        slots_per_rank=slots,
        batch_tokens=32,
        batch_kind=BatchKind.MIXED,
        baselines="none",
        prove_seconds=0,
    )
    return plan_trace(trace, FOUR, options), options.pricing


def test_what_filling_costs_is_the_price_of_the_filled_placement(trace):
    comparison, pricing = planned(trace, ReplicaRule.VLLM, 5)
    placement = comparison.result.placement
    spare = spare_slots(comparison, pricing)
    assert spare.num_empty == (placement.slot_experts < 0).sum() > 0
    assert spare.seconds == comparison.result.evaluation.batch_seconds_mean
    load = np.stack([np.bincount(i.ravel(), minlength=16) for i in _ids(comparison)])
    slots = np.array(placement.slot_experts).reshape(2, 4, 5)
    for layer, rows in zip(slots, load, strict=True):
        for rank in layer:
            for slot in np.flatnonzero(rank < 0):
                lacking = np.setdiff1d(np.arange(16), rank)
                rank[slot] = lacking[rows[lacking].argmin()]
    filled = replace(placement, slot_experts=slots.reshape(2, -1))
    value = evaluate(
        comparison.scored,
        filled,
        pricing.cost,
        batch_tokens=32,
        batch_kind=BatchKind.MIXED,
    )
    assert spare.filled_seconds == value.batch_seconds_mean
    assert spare.filled_seconds > spare.seconds
    said = f"{spare.num_empty} slots are empty: no replica tried there pays"
    assert said in spare.words()
    assert "replica rule vllm" in spare.words()
    assert spare.words().endswith("Fewer slots per rank are faster.")


@pytest.mark.parametrize("rule", list(ReplicaRule))
def test_plans_without_slots_to_spare_say_nothing(trace, rule):
    comparison, pricing = planned(trace, rule, 5, compute_bound=True)
    full = (comparison.result.placement.slot_experts >= 0).all()
    assert (spare_slots(comparison, pricing) is None) == full
    tight, _ = planned(trace, rule, 4)
    assert spare_slots(tight, pricing) is None


def test_slots_that_our_own_layer_leaves_empty_are_told_too(trace):
    comparison, pricing = planned(trace, ReplicaRule.MOETUNER, 5)
    spare = spare_slots(comparison, pricing)
    assert spare.num_empty == (comparison.result.placement.slot_experts < 0).sum() > 0
    assert spare.filled_seconds is None
    assert "no replica tried there pays under the replica rule moetuner" in (
        spare.words()
    )
    assert "plan by its replica rule" in spare.words()


def test_a_solver_that_makes_no_replicas_is_named(trace):
    asked = PlanOptions(solver="lpt", slots_per_rank=5, baselines="none")
    comparison = plan_trace(trace, FOUR, asked)
    words = spare_slots(comparison, asked.pricing).words()
    assert words.startswith("8 slots are empty: lpt puts no replica there.")


def test_slots_that_the_experts_do_not_fill_are_no_failed_replicas():
    ids = random_ids(np.random.default_rng(3), 200, 1, 15, 2)
    trace = make_trace(ids, 15, sequence=(np.arange(200) // 20).astype(np.int32))
    for rule, told in ((ReplicaRule.MOETUNER, False), (ReplicaRule.VLLM, True)):
        comparison, pricing = planned(trace, rule, 0)
        spare = spare_slots(comparison, pricing)
        assert (spare is not None) == told
    assert spare.words().startswith(
        "1 slot is empty: 15 experts do not fill the 16 slots of a layer."
    )


def _ids(comparison):
    return comparison.scored.topk_ids.swapaxes(0, 1)
