"""Baselines: each minimises what it is for, and none is an error."""

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Wire
from moetuner.evaluation.evaluate import Draws
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.planning.baselines import (
    BASELINES,
    QUICK_SECONDS,
    WITH_REPLICAS,
    Baselines,
    best_rival,
    solve_baselines,
    solver_of,
)
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SOLVERS, SolverOptions, get_solver
from moetuner.trace import read_trace
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)
QUICK = SolverOptions(time_limit=2, threads=2)


def problem_of(trace, slots=0, cost=None):
    workload = Workload(traces=(trace,), cost=cost or CostModel())
    return PlacementProblem.from_workload(workload, MACHINE, slots_per_rank=slots)


@pytest.fixture
def trace(rng):
    sequence = (np.arange(400) // 20).astype(np.int32)
    return make_trace(random_ids(rng, 400, 3, 16, 2, skew=1.5), 16, sequence=sequence)


def test_all_are_solvers_and_replicas_need_spare_slots(trace):
    assert {solver_of(name) for name in BASELINES} <= set(SOLVERS)
    for slots, wanted in ((4, False), (5, True)):
        problem = problem_of(trace, slots)
        found = solve_baselines(problem, Baselines.QUICK, QUICK)
        assert found.left_out == {}
        assert (WITH_REPLICAS in found.solutions) == wanted
        for name, solution in found.solutions.items():
            assert solution.placement.has_replicas == (name == WITH_REPLICAS)
            problem.check(solution.placement)


def test_each_is_what_its_solver_finds_and_one_may_be_skipped(trace):
    problem = problem_of(trace)
    found = solve_baselines(problem, Baselines.ALL, QUICK, skip="lpt")
    assert set(found.solutions) == set(BASELINES) - {"lpt", WITH_REPLICAS}
    affinity = found.solutions["affinity"]
    assert affinity.objective is Objective.TOTAL_TRAFFIC
    asked = PlacementProblem.from_workload(
        problem.workload, MACHINE, objective=Objective.TOTAL_TRAFFIC
    )
    again = get_solver("affinity").solve(asked, QUICK)
    np.testing.assert_array_equal(
        affinity.placement.slot_experts, again.placement.slot_experts
    )


def test_nobody_waits_for_cbc_after_an_interruption(trace):
    found = solve_baselines(problem_of(trace), Baselines.ALL, QUICK, hurry=True)
    assert found.left_out == {"ilp2": "the plan was interrupted"}
    assert "chain" in found.solutions


def test_without_cbc_the_programs_are_left_out_with_the_reason(
    trace, tmp_path, monkeypatch
):
    (tmp_path / "mip.py").write_text("raise ImportError('no CBC here')")
    monkeypatch.syspath_prepend(tmp_path)
    found = solve_baselines(problem_of(trace), Baselines.ALL, QUICK)
    assert "no CBC here" in found.left_out["ilp2"]
    assert "chain" in found.solutions


def test_what_counts_lack_is_left_out_with_the_reason(traces_dir):
    counts = read_trace(traces_dir / "gemma-4-26b-a4b-avifenesh" / "theme_counts.npz")
    problem = problem_of(counts, 33, CostModel(wire=Wire.ALLGATHER))
    found = solve_baselines(problem, Baselines.ALL, QUICK)
    need_tokens = {"affinity", "coactivation", "chain", "ilp2"}
    assert set(found.left_out) == need_tokens
    assert set(found.solutions) == set(BASELINES) - set(found.left_out)
    assert all("Record which" in found.left_out[name] for name in need_tokens)
    assert found.solutions[WITH_REPLICAS].placement.has_replicas


def test_quick_ones_end_soon_on_real_routing(traces_dir):
    trace = read_trace(traces_dir / "gpt-oss-20b-fingerprinting" / "mmlu.npz")
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,)), Topology(num_ranks=8, ranks_per_node=4)
    )
    found = solve_baselines(problem, Baselines.QUICK, SolverOptions())
    assert all(s.seconds < QUICK_SECONDS for s in found.solutions.values())


def test_the_best_rival_is_no_other_file_and_not_the_result():
    times = {
        "lpt": Draws(seconds=np.array([2.0, 2.0, 2.2]), units=9),
        "chain": Draws(seconds=np.array([1.5, 1.5, 1.6]), units=9),
        "mine": Draws(seconds=np.array([1.0, 1.1, 0.9]), units=9),
    }
    assert best_rival("chain", times).name == "lpt"
    rival = best_rival("mine", times)
    assert rival.name == "chain"
    assert rival.gain.gain == pytest.approx(1 / 3)
    assert best_rival("lpt", {"lpt": times["lpt"], "mine": times["mine"]}) is None
    unknown = Draws(seconds=np.full(3, np.nan), units=0)
    assert best_rival("mine", {"lpt": unknown, "mine": unknown}) is None


def test_slots_to_spare_change_no_baseline_but_the_one_with_replicas(trace):
    """So in a short time as many are there, and as good, as without these slots."""
    tight, roomy = problem_of(trace), problem_of(trace, 6)
    plain = solve_baselines(tight, Baselines.QUICK, QUICK).solutions
    found = solve_baselines(roomy, Baselines.QUICK, QUICK).solutions
    assert list(found) == [*plain, WITH_REPLICAS]
    for name, solution in plain.items():
        assert (found[name].placement.rank_of() == solution.placement.rank_of()).all()
        assert found[name].placement.slots_per_rank == 6
