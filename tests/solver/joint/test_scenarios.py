"""What a search looks at: batches of a workload as arrays."""

import numpy as np
import pytest
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver.joint.scenarios import POOLED, first_homes, make_scenarios
from strategies import TOY_COST, make_trace, random_ids


def test_tokens_begin_on_every_rank_whatever_is_sampled(rng):
    """Every second token of an even number of ranks would leave half of them out."""
    ids = random_ids(rng, 1000, 1, 16, 2)
    trace = make_trace(ids, 16)
    topology = Topology(num_ranks=8, ranks_per_node=8)
    workload = Workload(traces=(trace,), cost=TOY_COST, batch_tokens=0)
    problem = PlacementProblem.from_workload(workload, topology)
    scenarios = make_scenarios(workload, POOLED, 500)
    assert len(scenarios.token) == 500
    used = np.bincount(first_homes(problem, scenarios), minlength=8)
    assert used.max() - used.min() <= 1


def test_long_traces_are_looked_at_in_whole_scenarios(rng):
    trace = make_trace(random_ids(rng, 4000, 1, 16, 2), 16)
    workload = Workload(traces=(trace,), cost=TOY_COST, batch_tokens=100)
    scenarios = make_scenarios(workload, 0, 500)
    assert np.diff(scenarios.begin).tolist() == [100] * 5
    assert scenarios.row_scale.tolist() == [1.0] * 5
    assert scenarios.weight.sum() == pytest.approx(1)


def test_a_trace_without_tokens_does_not_disturb_the_others(rng):
    ids = random_ids(rng, 200, 1, 16, 2)
    traces = (make_trace(ids, 16), make_trace(ids[:0], 16))
    workload = Workload(traces=traces, cost=TOY_COST, batch_tokens=50)
    assert len(make_scenarios(workload, 0).topk_ids) == 200


def test_parts_of_batches_weigh_by_their_tokens_and_batches_alike(rng):
    """Sequences are never cut, so parts differ; together they are the whole trace."""
    ids = random_ids(rng, 600, 2, 16, 2)
    sequence = np.repeat(np.arange(4, dtype=np.int32), (20, 300, 30, 250))
    trace = make_trace(ids, 16, sequence=sequence)
    workload = Workload(traces=(trace,), cost=TOY_COST, batch_tokens=300)
    parts = make_scenarios(workload, 50)
    sizes = np.diff(parts.begin)
    assert len(set(sizes.tolist())) > 1
    assert parts.weight == pytest.approx(sizes / 600)
    pooled = np.einsum("s,s,sle->le", parts.weight, parts.row_scale, parts.load)
    whole = make_scenarios(workload, POOLED)
    assert pooled == pytest.approx(whole.load[0] * whole.row_scale[0])
    batches = make_scenarios(workload, 0)
    assert batches.weight.tolist() == [0.5, 0.5]
