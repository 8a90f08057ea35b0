"""`refit`: validated on one part, written as made of all tokens, and both are told."""

import dataclasses
import json

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError
from moetuner.placement.file import read_placement, write_placement
from moetuner.placement.topology import Topology
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.provenance import options_of, part_of
from moetuner.report.json import comparison_json
from moetuner.report.verdict import verdict
from moetuner.solver import SolverOptions, SolveStatus
from moetuner.solver.joint.config import JointConfig
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)


def asked(**fields):
    limits = SolverOptions(time_limit=1e4, threads=1, seed=4)
    fields = {"config": JointConfig(rounds=1), "baselines": "unplanned", **fields}
    return PlanOptions(solver_options=limits, batch_tokens=50, **fields)


@pytest.fixture(scope="module")
def trace():
    ids = random_ids(np.random.default_rng(8), 800, 3, 16, 2)
    return make_trace(ids, 16, sequence=(np.arange(800) // 20).astype(np.int32))


@pytest.fixture(scope="module")
def plans(trace):
    return plan_trace(trace, MACHINE, asked(refit=True))


def test_what_is_written_is_the_plan_that_nothing_held_out_makes(trace, plans):
    whole = plan_trace(trace, MACHINE, asked(plan_fraction=1.0)).result.placement
    assert plans.refit.placement.sha256() == whole.sha256()


def test_what_is_scored_is_the_plan_of_one_part(trace, plans):
    alone = plan_trace(trace, MACHINE, asked())
    assert plans.result.placement.sha256() == alone.result.placement.sha256()
    assert plans.result.evaluation.to_json() == alone.result.evaluation.to_json()
    assert plans.held_out
    assert plans.result.placement.sha256() != plans.refit.placement.sha256()
    assert alone.refit is None


def test_its_file_tells_what_validates_it_and_makes_it_again(trace, plans, tmp_path):
    write_placement(plans.refit.placement, tmp_path / "written.json")
    read = read_placement(tmp_path / "written.json")
    told = read.provenance.validation
    assert told["score_tokens"] == plans.score_tokens
    assert told["batch_seconds_mean"] == plans.result.evaluation.batch_seconds_mean
    assert told["gain"] == dataclasses.asdict(plans.result.gain)
    assert told["gain_over_best"] == dataclasses.asdict(plans.rival.gain)
    assert told["placement_sha256"] == plans.result.placement.sha256()

    again = plan_trace(trace, read.topology, options_of(read))
    assert again.refit.placement.sha256() == read.sha256()
    assert again.refit.placement.provenance.validation == told


def test_the_plan_of_one_part_can_be_made_again_too(trace, plans):
    options = options_of(plans.result.placement)
    assert not options.refit
    again = plan_trace(trace, MACHINE, options)
    assert again.result.placement.sha256() == plans.result.placement.sha256()


def test_no_token_of_the_recording_is_called_held_out_for_it(trace, plans):
    written = plans.refit.placement
    assert part_of(written, trace.sha256()) == (1.0, 4)
    found = compare_placements(trace, {"written": written}, plans.cost)
    assert found.in_sample
    assert "What validates it is a plan of one part" in verdict(found)
    assert part_of(plans.result.placement, trace.sha256()) == (0.5, 4)


def test_the_verdict_and_json_tell_the_two_apart(plans):
    assert "Written is the plan that the same options make of all" in verdict(plans)
    told = json.loads(json.dumps(comparison_json(plans)))["refit"]
    assert told["placement_sha256"] == plans.refit.placement.sha256()
    assert told["validation"]["plan_tokens"] == plans.plan_tokens


def test_several_recordings_are_planned_whole(trace):
    other = make_trace(
        random_ids(np.random.default_rng(9), 400, 3, 16, 2),
        16,
        sequence=(np.arange(400) // 20).astype(np.int32),
    )
    both = plan_trace(trace, MACHINE, asked(refit=True), others=[other])
    whole = plan_trace(trace, MACHINE, asked(plan_fraction=1.0), others=[other])
    assert both.refit.placement.sha256() == whole.result.placement.sha256()
    assert both.refit.placement.provenance.other_traces == (other.sha256(),)


def test_a_single_sequence_is_planned_whole_at_once(trace):
    one = dataclasses.replace(trace, sequence=np.zeros(800, np.int32))
    assert plan_trace(one, MACHINE, asked(refit=True)).refit is None


def test_kept_placements_come_in_order(trace):
    kept = []
    plans = plan_trace(trace, MACHINE, asked(refit=True), on_solved=kept.append)
    assert kept == [plans.result.placement, plans.refit.placement]


@pytest.mark.parametrize("which", [1, 2])
def test_an_interrupted_search_makes_nothing_anew(trace, monkeypatch, which):
    """Whichever it was: the plan that was scored is the one that is kept."""
    from moetuner.solver.joint.solver import JointSolver

    solve, calls = JointSolver.solve, []

    def interrupted(self, *arguments, **options):
        calls.append(self)
        found = solve(self, *arguments, **options)
        if len(calls) == which:
            return dataclasses.replace(found, status=SolveStatus.INTERRUPTED)
        return found

    monkeypatch.setattr(JointSolver, "solve", interrupted)
    kept = []
    plans = plan_trace(trace, MACHINE, asked(refit=True), on_solved=kept.append)
    assert plans.refit is None
    assert len(calls) == which
    assert kept == [plans.result.placement]


def test_a_plan_of_all_tokens_has_nothing_to_refit():
    with pytest.raises(InvalidProblemError, match="refit has nothing to add"):
        asked(plan_fraction=1, refit=True)
