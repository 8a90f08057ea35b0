"""Programs of single layers, and the search around them, on a real recording."""

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.shapes import shape_for_model
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.programs.cbc import solve_milps
from moetuner.solver.programs.layer import layer_program
from moetuner.solver.programs.layer_tokens import LayerTokens
from moetuner.trace import read_trace, split_by_sequence


@pytest.fixture
def problem(traces_dir):
    trace = read_trace(traces_dir / "gpt-oss-20b-fingerprinting" / "gpqa.npz")
    cost = CostModel(shape=shape_for_model("gpt-oss"), homes=Homes.UNIFORM)
    return PlacementProblem.from_workload(
        Workload(traces=(split_by_sequence(trace).plan,), cost=cost),
        Topology(num_ranks=8, ranks_per_node=4),
    )


def test_what_a_program_promises_is_what_the_evaluator_finds(problem):
    start = min(quick_placements(problem), key=problem.objective_value)
    seconds, rank_of = problem.workload.layer_seconds(start), start.rank_of()
    ranks = np.array([1, 2, 6])
    programs = [
        layer_program(
            problem, LayerTokens.of(problem, i), rank_of[i], ranks, seconds[i]
        )
        for i in (0, 12)
    ]
    gains = []
    results = solve_milps([p.model for p in programs], time_limit=60, threads=1)
    for layer, program, result in zip((0, 12), programs, results, strict=True):
        assert result.status is SolveStatus.OPTIMAL
        changed = rank_of.copy()
        changed[layer] = program.read(result.x)
        fixed = ~np.isin(rank_of[layer], ranks)
        assert (changed[layer] == rank_of[layer])[fixed].all()
        found = type(start).from_rank_of(
            changed,
            layer_ids=start.layer_ids,
            topology=problem.topology,
            slots_per_rank=problem.slots_per_rank,
        )
        promised = program.seconds(program.model.objective @ result.x)
        assert problem.workload.layer_seconds(found)[layer] == pytest.approx(
            promised, rel=1e-6
        )
        assert promised <= seconds[layer] * (1 + 1e-6)
        gains.append(1 - promised / seconds[layer])
    assert max(gains) > 0.001


@pytest.mark.slow
def test_it_takes_one_percent_from_the_quick_methods(problem):
    quick = min(map(problem.objective_value, quick_placements(problem)))
    options = SolverOptions(time_limit=15, threads=2)
    assert get_solver("lns").solve(problem, options).value < 0.99 * quick
