"""A sweep is so many plans, each what `plan_trace` makes of the same options."""

import dataclasses

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError, MissingStatisticsError
from moetuner.evaluation.cost import CostModel, Wire
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions, Pricing
from moetuner.planning.plan import plan_trace
from moetuner.planning.sweep import Setup, sweep
from moetuner.solver import SolverOptions, SolveStatus
from moetuner.solver.joint.config import JointConfig
from moetuner.trace import CountTrace
from moetuner.trace.phases import Phase
from strategies import make_trace, random_ids

SHAPE = ModelShape(hidden_size=64, expert_hidden_size=32)
PRICING = Pricing(cost=CostModel(shape=SHAPE), batch_tokens=50)
EXPERT = 3 * 64 * 32 * 2  # bytes
ASKED = PlanOptions(
    solver="lpt", solver_options=SolverOptions(time_limit=100, seed=3, threads=1)
)


@pytest.fixture(scope="module")
def trace():
    ids = random_ids(np.random.default_rng(8), 800, 3, 16, 2)
    return make_trace(ids, 16, sequence=(np.arange(800) // 20).astype(np.int32))


def setup(ranks, **fields):
    return Setup(num_ranks=ranks, **{"pricing": PRICING, **fields})


def test_a_cell_is_the_plan_that_plan_trace_makes(trace):
    found = sweep(trace, [setup(4), setup(4, redundant=4, ranks_per_node=2)], ASKED)
    for cell, per_node, slots in zip(found.cells, (4, 2), (4, 5), strict=True):
        alone = plan_trace(
            trace,
            Topology(num_ranks=4, ranks_per_node=per_node),
            dataclasses.replace(
                ASKED, cost=PRICING.cost, batch_tokens=50, slots_per_rank=slots
            ),
        )
        assert cell.placement.sha256() == alone.result.placement.sha256()
        assert cell.scored.rival == alone.rival
        own = alone.result.evaluation
        assert cell.batch_seconds == own.batch_seconds_mean
        assert cell.imbalance == own.imbalance_mean
        assert cell.placement.slots_per_rank == slots
        assert cell.placement.topology.ranks_per_node == per_node


def test_figures_of_a_gpu(trace):
    (cell,) = sweep(trace, [setup(8, slots_per_rank=3)], ASKED).cells
    scores = cell.scored.result.evaluation
    total = scores.batch_seconds.sum()
    assert cell.tokens_per_second == pytest.approx(scores.num_tokens / total / 8)
    assert cell.batch_size == scores.num_tokens / len(scores.batch_seconds)
    assert cell.weight_bytes == EXPERT * 3 * 3  # slots, layers
    assert cell.redundant == 8


def test_the_best_by_each_measure_and_ties_go_to_the_faster(trace):
    setups = [setup(2), setup(8), setup(16), setup(8, redundant=8)]
    found = sweep(trace, setups, ASKED)
    best = found.best()
    cells = found.planned
    assert best["time"].batch_seconds == min(c.batch_seconds for c in cells)
    most = max(c.tokens_per_second for c in cells)
    assert best["tokens_per_second"].tokens_per_second == most
    assert best["memory"].setup.num_ranks == 16  # one expert of 16 a layer
    # The same weights on the same GPUs: the second machine is faster.
    fast = dataclasses.replace(HARDWARE["h100"], rank_latency=0.0)
    cost = dataclasses.replace(PRICING.cost, hardware=fast)
    faster = setup(8, pricing=dataclasses.replace(PRICING, cost=cost))
    pair = sweep(trace, [setup(8), faster], ASKED)
    assert pair.best()["memory"] is pair.cells[1]


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (setup(12), "ranks_per_node must divide num_ranks=12, got 8"),
        (setup(32), "num_ranks must be at most 16"),
        (setup(32, redundant=1), "num_ranks must be at most 16"),
        (setup(8, redundant=4), "redundant must leave equal slots on 8 ranks"),
        (setup(3, redundant=1), "Nearest: 2 (6 slots a rank)"),
        (setup(4, slots_per_rank=3), "slots_per_rank must be 4..16"),
        (setup(4, slots_per_rank=17), "slots_per_rank must be 4..16"),
        (setup(8, redundant=-8), "redundant must be a whole number >= 0"),
        (setup(0), "num_ranks must be 1"),
        (setup(4), "memory=7.5e-05 GB is less than the expert weights"),
    ],
)
def test_what_cannot_be_planned_is_named_and_the_rest_planned(trace, refused, why):
    limit = EXPERT * 3 * 2  # two slots
    found = sweep(trace, [refused, setup(8)], ASKED, memory=limit + 1272)
    assert [cell.comparison is None for cell in found.cells] == [True, False]
    assert why in found.cells[0].why_not
    assert found.planned == found.cells[1:]


def test_nothing_to_plan_is_an_error_that_says_why(trace):
    with pytest.raises(InvalidProblemError, match="at most 16"):
        sweep(trace, [setup(32), setup(64)], ASKED)
    with pytest.raises(InvalidProblemError, match="nothing was asked for"):
        sweep(trace, [], ASKED)
    with pytest.raises(InvalidProblemError, match="memory must be > 0"):
        sweep(trace, [setup(8)], ASKED, memory=0)


def test_what_no_cell_can_answer_is_no_cells_fault(trace):
    counts = CountTrace(
        counts=np.ones((4, 3, 16), np.int64),
        num_tokens=np.full(4, 8),
        layer_ids=trace.layer_ids,
    )
    with pytest.raises(MissingStatisticsError, match="only counted loads"):
        sweep(counts, [setup(4)], ASKED)
    cost = dataclasses.replace(PRICING.cost, wire=Wire.ALLGATHER)
    allgather = dataclasses.replace(PRICING, cost=cost)
    assert sweep(counts, [setup(4, pricing=allgather)], ASKED).planned


def test_an_interrupted_cell_is_no_cell_and_those_before_it_are_kept(
    trace, monkeypatch
):
    from moetuner.solver.heuristics.lpt import LptSolver

    solve, done = LptSolver.solve, []

    def interrupted(self, problem, *arguments, **options):
        found = solve(self, problem, *arguments, **options)
        if problem.topology.num_ranks == 4:
            return dataclasses.replace(
                found,
                status=SolveStatus.INTERRUPTED,
                placement=dataclasses.replace(
                    found.placement,
                    provenance=dataclasses.replace(
                        found.placement.provenance, status="interrupted"
                    ),
                ),
            )
        return found

    monkeypatch.setattr(LptSolver, "solve", interrupted)
    setups = [setup(2), setup(4), setup(8)]
    found = sweep(trace, setups, ASKED, on_cell=done.append)
    assert found.interrupted
    assert [cell.why_not for cell in found.cells] == ["", "interrupted", "interrupted"]
    assert done == [found.cells[0]]


def test_news_name_the_cell(trace):
    heard = []
    options = dataclasses.replace(
        ASKED, solver="joint", config=JointConfig(rounds=1), baselines="none"
    )
    sweep(trace, [setup(2), setup(4)], options, progress=heard.append)
    stages = {event.stage.partition(",")[0] for event in heard}
    assert stages == {"cell 1/2", "cell 2/2"}


def test_a_phase_is_planned_and_scored_alone(trace):
    phased = dataclasses.replace(
        trace, phase=(np.arange(800) % 20 >= 15).astype(np.uint8)
    )
    decode = dataclasses.replace(PRICING, phase=Phase.DECODE, batch_kind="mixed")
    (cell,) = sweep(phased, [setup(4, pricing=decode)], ASKED).cells
    assert cell.scored.score_tokens == 200 - cell.scored.plan_tokens == 100
    assert cell.batch_size <= 50
