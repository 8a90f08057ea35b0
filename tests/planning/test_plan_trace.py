"""plan_trace: planned on one part, scored on the other, with honest intervals."""

import dataclasses
import math

import moetuner
import numpy as np
import pytest
from moetuner.errors import (
    InvalidProblemError,
    InvalidTraceError,
    MissingStatisticsError,
    SolverError,
)
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import draw_batches, evaluate, paired_gain
from moetuner.evaluation.workload import BatchKind, Workload
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import demo_trace, plan_trace
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.heuristics.eplb import EplbConfig
from moetuner.solver.joint.config import JointConfig
from moetuner.trace import Trace, TraceMetadata, split_by_sequence
from strategies import make_trace, random_ids

QUICK = ("contiguous", "random", "lpt", "eplb", "affinity", "coactivation", "chain")
FOUR = Topology(num_ranks=4, ranks_per_node=2)


def options(solver="lpt", **fields):
    quick = SolverOptions(time_limit=2, threads=2, seed=fields.pop("seed", 0))
    return PlanOptions(solver=solver, solver_options=quick, **fields)


@pytest.fixture
def trace(rng):
    return make_trace(
        random_ids(rng, 800, 3, 16, 2),
        16,
        sequence=(np.arange(800) // 20).astype(np.int32),
        metadata=TraceMetadata(model="a model"),
    )


def test_every_score_is_of_the_held_out_tokens(trace):
    report = plan_trace(trace, FOUR, options(plan_fraction=0.25, seed=5))
    split = split_by_sequence(trace, 0.25, 5)
    assert report.plan_tokens == split.plan.num_tokens == 200
    assert report.score_tokens == split.score.num_tokens == 600
    for candidate in report.candidates:
        again = evaluate(split.score, candidate.placement, report.cost)
        assert candidate.evaluation.to_json() == again.to_json()


def test_every_placement_is_planned_on_the_other_tokens(trace):
    report = plan_trace(trace, FOUR, options(seed=5))
    workload = Workload(traces=(split_by_sequence(trace, 0.5, 5).plan,))
    for candidate in report.candidates:
        problem = PlacementProblem.from_workload(
            workload, FOUR, objective=candidate.solution.objective
        )
        solution = get_solver(candidate.name).solve(problem, SolverOptions(seed=5))
        np.testing.assert_array_equal(
            candidate.placement.slot_experts, solution.placement.slot_experts
        )
        assert candidate.solution.value == problem.objective_value(candidate.placement)


def test_held_out_tokens_never_change_the_placement(trace):
    """Other routing in the held-out part: the same placements, other scores."""
    report = plan_trace(trace, FOUR, options())
    plan_sequences = np.unique(split_by_sequence(trace).plan.sequence)
    ids = trace.topk_ids.copy()
    held_out = ~np.isin(trace.sequence, plan_sequences)
    ids[held_out] = 15 - ids[held_out]
    other = plan_trace(dataclasses.replace(trace, topk_ids=ids), FOUR, options())
    np.testing.assert_array_equal(
        report.result.placement.slot_experts, other.result.placement.slot_experts
    )
    assert report.result.evaluation.imbalance_mean != (
        other.result.evaluation.imbalance_mean
    )


@pytest.mark.parametrize("solver", ["contiguous", "random", "lpt", "chain", "ilp1"])
def test_candidates_are_baselines_and_result_once_each(trace, solver):
    report = plan_trace(trace, FOUR, options(solver))
    names = [candidate.name for candidate in report.candidates]
    assert len(names) == len(set(names))
    assert set(names) == {*QUICK, solver}
    assert report.baseline.name == "contiguous"
    assert report.result.name == solver
    assert (report.result is report.baseline) == (solver == "contiguous")


def test_provenance_names_solver_trace_and_resolved_options(trace):
    report = plan_trace(trace, FOUR, options("joint", seed=2, slots_per_rank=5))
    for candidate in report.candidates:
        provenance = candidate.placement.provenance
        solver = candidate.name.removesuffix("+replica")
        assert provenance.solver == solver
        assert provenance.options["solver"] == solver
        assert provenance.model == "a model"
        assert provenance.trace_sha256 == trace.sha256()
        assert provenance.status == candidate.solution.status.value
        assert provenance.options["solver_options"]["seed"] == 2
        assert provenance.options["slots_per_rank"] == 5
        assert provenance.versions["moetuner"] == moetuner.__version__


def test_what_joint_alone_takes_is_not_asked_of_the_baselines(trace):
    blocks = plan_trace(trace, FOUR, options("contiguous")).candidates[0].placement
    config = JointConfig(favour="few-ranks", stay=blocks, move_seconds=1e-9)
    asked = {
        candidate.name: candidate.placement.provenance.options["config"]
        for candidate in plan_trace(
            trace, FOUR, options("joint", config=config)
        ).candidates
    }
    own = asked.pop("joint")
    assert (own["favour"], own["move_seconds"]) == ("few-ranks", 1e-9)
    assert own["stay"] == {"sha256": blocks.sha256()}
    assert set(asked) == {*QUICK, "in use"}
    assert not any("favour" in (config or {}) for config in asked.values())


def test_the_gain_is_that_of_the_mean_batch_and_lies_in_its_interval(trace):
    report = plan_trace(trace, FOUR, options(batch_tokens=100))
    before = report.baseline.evaluation.batch_seconds_mean
    for candidate in report.candidates[1:]:
        after = candidate.evaluation.batch_seconds_mean
        assert candidate.gain.gain == pytest.approx(1 - after / before, rel=1e-12)
        assert candidate.gain.low <= candidate.gain.gain <= candidate.gain.high
        assert candidate.gain.confidence == 0.95


@pytest.mark.parametrize("kind", list(BatchKind))
def test_the_interval_is_of_paired_draws_of_held_out_batches(trace, kind):
    asked = options(seed=3, batch_tokens=100, batch_kind=kind)
    report = plan_trace(trace, FOUR, asked)
    held_out = split_by_sequence(trace, 0.5, 3).score
    before, after = (
        draw_batches(held_out, c.placement, report.cost, c.evaluation, kind, seed=3)
        for c in (report.baseline, report.result)
    )
    assert report.result.gain == paired_gain(before, after)


def test_equal_sequences_leave_no_doubt(rng):
    """Every draw of identical sequences is the same trace: an interval of no width."""
    ids = np.tile(random_ids(rng, 50, 2, 16, 2), (20, 1, 1))
    sequence = (np.arange(1000) // 50).astype(np.int32)
    gain = plan_trace(make_trace(ids, 16, sequence=sequence), FOUR, options()).result
    assert gain.gain.low == pytest.approx(gain.gain.gain)
    assert gain.gain.high == pytest.approx(gain.gain.gain)


def test_a_router_without_preference_gives_no_certain_gain():
    """Over 20 uniform traces the 95% interval leaves out zero hardly ever."""
    surprises = 0
    for seed in range(20):
        ids = random_ids(np.random.default_rng(seed), 4000, 3, 16, 2, skew=0.0)
        sequence = (np.arange(4000) // 50).astype(np.int32)
        report = plan_trace(make_trace(ids, 16, sequence=sequence), FOUR, options())
        surprises += report.result.gain.certain
    assert surprises <= 4


def test_one_held_out_sequence_has_no_interval(rng):
    sequence = (np.arange(400) // 200).astype(np.int32)
    trace = make_trace(random_ids(rng, 400, 2, 8, 2), 8, sequence=sequence)
    report = plan_trace(trace, FOUR, options())
    assert [candidate.gain for candidate in report.candidates] == [None] * len(QUICK)
    assert report.rival is None


def test_draws_without_a_routed_token_tell_nothing(rng):
    """Most sequences are padding; bootstrap draws of those alone have no gain."""
    ids = random_ids(rng, 300, 2, 8, 2)
    ids[(np.arange(300) // 10) % 10 > 0] = -1
    sequence = (np.arange(300) // 10).astype(np.int32)
    gain = plan_trace(make_trace(ids, 8, sequence=sequence), FOUR, options()).result
    assert all(map(math.isfinite, (gain.gain.low, gain.gain.gain, gain.gain.high)))


def test_the_placement_is_handed_over_before_the_scoring(trace):
    kept = []
    report = plan_trace(trace, FOUR, options(), on_solved=kept.append)
    assert kept == [report.result.placement]
    assert kept[0].provenance.trace_sha256 == trace.sha256()


def test_what_cannot_be_scored_is_refused_before_the_solve(trace):
    kept = []
    for homes in (Homes.RECORDED, Homes.FOLLOW):
        cost = CostModel(homes=homes)
        with pytest.raises(InvalidTraceError, match=f"homes={homes.value}"):
            plan_trace(trace, FOUR, options(cost=cost), on_solved=kept.append)
    assert kept == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"slots_per_rank": 17}, InvalidProblemError),
        ({"slots_per_rank": 3}, InvalidProblemError),
        ({"solver": "magic"}, SolverError),
        ({"solver": "chain", "config": JointConfig()}, SolverError),
        ({"solver": "joint", "config": EplbConfig()}, SolverError),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_trace_are_refused(trace, fields, error):
    with pytest.raises(error):
        plan_trace(trace, FOUR, options(**fields))


@pytest.mark.parametrize("fraction", [0.0, 1.1, -1.0, math.nan])
def test_options_refuse_a_fraction_outside_zero_to_one(fraction):
    with pytest.raises(InvalidProblemError, match="plan_fraction"):
        PlanOptions(plan_fraction=fraction)


def test_options_refuse_an_endless_solve():
    with pytest.raises(InvalidProblemError, match="time_limit"):
        PlanOptions(solver_options=SolverOptions(time_limit=math.inf))


def test_padding_alone_is_refused(rng):
    ids = np.full((40, 2, 2), -1, np.int16)
    trace = make_trace(ids, 8, sequence=np.arange(40, dtype=np.int32))
    with pytest.raises(InvalidTraceError, match="all padding"):
        plan_trace(trace, FOUR, options())


def test_allgather_needs_no_tokens(traces_dir):
    from moetuner.trace import read_trace

    counts = read_trace(traces_dir / "gemma-4-26b-a4b-avifenesh" / "theme_counts.npz")
    with pytest.raises(MissingStatisticsError, match="allgather"):
        plan_trace(counts, FOUR, options())
    report = plan_trace(counts, FOUR, options(cost=CostModel(wire=Wire.ALLGATHER)))
    assert report.plan_tokens + report.score_tokens == counts.num_tokens.sum()
    assert report.result.gain is not None
    assert set(report.left_out) == {"affinity", "coactivation", "chain"}
    assert all("choose" in why or "chose" in why for why in report.left_out.values())


def test_demo_trace_is_a_real_one_that_can_be_planned():
    trace = demo_trace()
    assert isinstance(trace, Trace)
    assert trace.metadata.model
    assert trace.num_sequences >= 20
    report = plan_trace(trace, Topology(num_ranks=8, ranks_per_node=4), options())
    assert report.score_tokens + report.plan_tokens == trace.num_tokens


def test_a_lower_bound_comes_as_the_last_stage_when_asked_for(trace):
    news = []
    report = plan_trace(
        trace, FOUR, options("joint", prove_seconds=3.0), progress=news.append
    )
    solution = report.result.solution
    stage = solution.stages[-1]
    assert stage.name == "lower bound"
    assert 0 < stage.lower_bound == solution.lower_bound <= solution.value
    assert "certify" in {event.stage for event in news}
    plain = plan_trace(trace, FOUR, options("joint")).result.solution
    assert plain.lower_bound is None
    with pytest.raises(InvalidProblemError, match="prove_seconds must be >= 0 s"):
        options(prove_seconds=-1.0)


def two_domains(rng):
    """Recordings of one router whose hot experts differ."""
    found = []
    for hot in (0, 8):
        ids = random_ids(rng, 600, 3, 16, 2, skew=2.0)
        ids = np.where(ids >= 0, (ids + hot) % 16, ids).astype(np.int16)
        sequence = (np.arange(600) // 20).astype(np.int32)
        found.append(make_trace(ids, 16, sequence=sequence))
    return found


def test_every_recording_is_scored_on_its_own_held_out_part(rng):
    first, second = two_domains(rng)
    wanted = options("joint", weights=(3, 1))
    report = plan_trace(first, FOUR, wanted, others=(second,))
    (other,) = report.others
    split = split_by_sequence(second, wanted.plan_fraction, 0)
    assert other.trace_sha256 == second.sha256()
    assert other.plan_tokens + other.score_tokens == second.num_tokens
    names = [each.name for each in report.candidates]
    assert [each.name for each in other.candidates] == names
    score = evaluate(split.score, report.result.placement, wanted.cost)
    times = {c.name: c.evaluation.batch_seconds_mean for c in other.candidates}
    assert times["joint"] == score.batch_seconds_mean
    gain = 1 - times["joint"] / times["contiguous"]
    assert other.result.gain.gain == pytest.approx(gain)
    assert other.rival.name == min(set(QUICK), key=times.__getitem__)
    blocks, joint = (
        0.75 * first.evaluation.batch_seconds_mean
        + 0.25 * again.evaluation.batch_seconds_mean
        for first, again in (
            (report.baseline, other.baseline),
            (report.result, other.result),
        )
    )
    assert report.overall.gain == pytest.approx(1 - joint / blocks)
    origin = report.result.placement.provenance
    assert origin.other_traces == (second.sha256(),)
    assert origin.options["weights"] == [3, 1]


@pytest.mark.parametrize("worst_case", [False, True])
def test_the_plan_is_for_all_recordings_as_they_count(rng, worst_case):
    traces = two_domains(rng)
    wanted = options("joint", worst_case=worst_case)
    report = plan_trace(traces[0], FOUR, wanted, others=traces[1:])
    means = [
        evaluate(
            split_by_sequence(trace, wanted.plan_fraction, 0).plan,
            report.result.placement,
            wanted.cost,
        ).batch_seconds_mean
        for trace in traces
    ]
    value = report.result.solution.value
    assert value == pytest.approx(max(means) if worst_case else np.mean(means))


@pytest.mark.parametrize("favoured", [0, 1])
def test_weights_matter_to_baselines_too(rng, favoured):
    traces = two_domains(rng)

    def imbalance(weights):
        wanted = options("lpt", weights=weights)
        report = plan_trace(traces[0], FOUR, wanted, others=traces[1:])
        part = split_by_sequence(traces[favoured], 0.5, 0).plan
        score = evaluate(part, report.result.placement, wanted.cost)
        return score.imbalance_mean

    weights = (100, 1) if favoured == 0 else (1, 100)
    least = imbalance(weights)
    assert least < 0.99 * imbalance(())
    assert least < 0.99 * imbalance(weights[::-1])


def test_recordings_of_other_models_and_wrong_weights_are_refused(rng):
    first, second = two_domains(rng)
    longer = make_trace(random_ids(rng, 600, 4, 16, 2), 16, sequence=first.sequence)
    with pytest.raises(InvalidTraceError, match="different models"):
        plan_trace(first, FOUR, options(), others=(longer,))
    with pytest.raises(InvalidProblemError, match="2 positive numbers"):
        plan_trace(first, FOUR, options(weights=(1,)), others=(second,))
