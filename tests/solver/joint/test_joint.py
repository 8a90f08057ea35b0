"""The joint planner and the search behind it."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moetuner import _core
from moetuner.errors import InvalidProblemError, SolverError
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.workload import Workload, price, tally_batches
from moetuner.placement.moves import fetched_replicas, replicas_of
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.base import Clock, finish, place
from moetuner.solver.heuristics.starts import quick_placements, start_ranks
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.layers import LayerRounds, search_options
from moetuner.solver.joint.profiles import (
    TIME_PROFILES,
    Favour,
    choose_profile,
)
from moetuner.solver.joint.replan import layers_that_pay
from moetuner.solver.joint.scenarios import (
    POOLED,
    SearchProfile,
    members,
)
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.solver.joint.tokens import TokenRounds
from oracle import oracle
from strategies import (
    TOY_COST,
    machines,
    make_trace,
    random_ids,
    random_problem,
)

NOTHING_MORE = SearchProfile(
    scenario_tokens=0, peak=0, pooled=0, variance=0, rank_copies=0, node_copies=0
)
TOPOLOGIES = [
    Topology(num_ranks=g, ranks_per_node=m)
    for g, m in [(2, 1), (2, 2), (4, 2), (4, 4), (6, 3), (6, 1)]
]


@st.composite
def problems(
    draw,
    max_experts=12,
    homes=(Homes.UNIFORM,),
    topologies=TOPOLOGIES,
    num_layers=2,
    **options,
):
    """A small problem with batches, on one or two link levels, with empty slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    topology = draw(st.sampled_from(topologies))
    num_experts = draw(st.integers(topology.num_ranks, max_experts))
    num_tokens = draw(st.sampled_from([1, 40, 150]))
    top_k = min(3, num_experts)
    ids = random_ids(rng, num_tokens, num_layers, num_experts, top_k, 0.1, 2.0)
    trace = make_trace(
        ids,
        num_experts,
        sequence=np.arange(num_tokens, dtype=np.int32) // 7,
        ranked=True,
        home_rank=rng.integers(0, topology.num_ranks, num_tokens).astype(np.int16),
    )
    speeds = draw(st.sampled_from([(), tuple(rng.uniform(0.5, 1, topology.num_ranks))]))
    cost = replace(
        TOY_COST,
        hardware=draw(machines(TOY_COST.hardware, topology)),
        wire=draw(st.sampled_from(Wire)),
        homes=draw(st.sampled_from(homes)),
        rank_speeds=speeds,
    )
    workload = Workload(
        traces=(trace,), cost=cost, batch_tokens=draw(st.sampled_from([0, 30, 70]))
    )
    slots = -(-num_experts // topology.num_ranks) + draw(st.integers(0, 1))
    problem = PlacementProblem.from_workload(
        workload, topology, slots_per_rank=slots, **options
    )
    return problem, rng


def rounds_of(problem, profile, seed=0):
    return LayerRounds(
        problem=problem,
        options=SolverOptions(seed=seed, threads=2),
        profile=profile,
        start=start_ranks(problem)[0],
        runner=Interruptible(),
    )


def anneal(rounds, start, proposals, seed=1):
    return rounds.anneal(start, proposals, 60.0, seed, np.zeros(1, np.int32))


def exchange_seconds(problem, placement):
    """Mean over batches of what the links take."""
    (trace,), (batches,) = problem.workload.traces, problem.workload.batches
    cost = problem.workload.cost
    parts = price(tally_batches(trace, placement, cost, batches), cost)
    return (parts.dispatch + parts.combine).sum(axis=1).mean()


@given(problems())
def test_the_search_cost_without_extras_is_the_modelled_time(case):
    problem, rng = case
    rounds = rounds_of(problem, NOTHING_MORE)
    row = members(problem, start_ranks(problem)[0])
    start = rng.permuted(row, axis=1)
    before = problem.objective_value(place(problem, start[:, : problem.num_experts]))
    found, cost = anneal(rounds, start, 200)
    rank_of = found[:, : problem.num_experts]
    value = problem.objective_value(place(problem, rank_of))
    constant = 0.0
    if problem.workload.cost.wire is Wire.ALLGATHER:  # its links do not care
        constant = exchange_seconds(problem, place(problem, rank_of))
    assert cost.sum() + constant == pytest.approx(value, rel=1e-9)
    assert value <= before * (1 + 1e-9)


@given(
    problems(),
    st.builds(
        SearchProfile,
        scenario_tokens=st.sampled_from([0, 16, POOLED]),
        peak=st.sampled_from([0.0, 1.0]),
        pooled=st.sampled_from([0.0, 2.0]),
        variance=st.sampled_from([0.0, 3.0]),
        rank_copies=st.sampled_from([0.0, 4.0]),
    ),
)
def test_changes_add_up_to_the_cost_computed_afresh(case, profile):
    problem, _ = case
    rounds = rounds_of(problem, profile)
    found, cost = anneal(rounds, members(problem, rounds.start), 300)
    again, fresh = anneal(rounds, found, 0)
    assert cost == pytest.approx(fresh, rel=1e-9)
    np.testing.assert_array_equal(again, found)  # nothing was left to descend
    for layer in range(problem.num_layers):
        sizes = np.bincount(found[layer], minlength=problem.topology.num_ranks)
        assert (sizes == problem.slots_per_rank).all()


@settings(max_examples=20)
@given(problems(max_experts=5, topologies=TOPOLOGIES[:4]))
def test_tiny_problems_are_solved_like_the_oracle_does(case):
    problem, _ = case
    solver = JointSolver(config=JointConfig(profile=NOTHING_MORE, rounds=3))
    solution = solver.solve(problem, SolverOptions(time_limit=600, threads=2))
    truth = oracle(problem).value
    assert solution.value == problem.objective_value(solution.placement)
    if solution.placement.has_replicas:  # the oracle knows none
        assert solution.value <= truth * (1 + 1e-9)
    else:
        assert solution.value == pytest.approx(truth, rel=1e-9)


def big_problem(rng, **options):
    return random_problem(
        rng, 6, 32, Topology(num_ranks=8, ranks_per_node=4), **options
    )


def modelled(problem):
    return replace(problem, objective="modelled-time")


def test_rounds_and_seed_decide_whatever_the_threads(rng):
    problem = modelled(big_problem(rng))
    solver = JointSolver(config=JointConfig(rounds=3))
    rows = [
        solver.solve(
            problem, SolverOptions(seed=seed, threads=threads)
        ).placement.slot_experts.tolist()
        for seed, threads in ((5, 1), (5, 2), (6, 2))
    ]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_more_rounds_are_never_worse_in_search_cost(rng):
    rounds = rounds_of(modelled(big_problem(rng)), SearchProfile())
    totals = []
    for length in (100, 200, 400, 400):
        rounds.round(length, 60.0)
        totals.append(rounds.cost.sum())
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]


def test_never_worse_than_the_quick_methods_and_better_than_them(rng):
    problem = modelled(big_problem(rng))
    solution = JointSolver(config=JointConfig(rounds=2)).solve(problem)
    starts = [problem.objective_value(place(problem, s)) for s in start_ranks(problem)]
    assert len(starts) == 3
    assert solution.value < min(starts)


@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_the_time_limit_holds_and_is_used(rng, limit):
    problem = modelled(
        random_problem(rng, 24, 64, Topology(num_ranks=8, ranks_per_node=8))
    )
    solver = JointSolver(config=JointConfig(patience=1000))
    began = time.monotonic()
    solution = solver.solve(problem, SolverOptions(time_limit=limit))
    assert time.monotonic() - began < 60  # of the hours that its rounds would take
    assert solution.status is SolveStatus.TIME_LIMIT
    problem.check(solution.placement)


def test_a_slow_rank_is_given_less(rng):
    problem = modelled(random_problem(rng, 3, 16, TOPOLOGIES[3]))
    workload = problem.workload
    compute_bound = replace(
        workload.cost,
        hardware=replace(
            workload.cost.hardware, matmul_rate=1e10, memory_bandwidth=1e15
        ),
    )
    loads = []
    for speeds in ((1, 1, 1, 1), (0.25, 1, 1, 1)):
        cost = replace(compute_bound, rank_speeds=speeds)
        asked = replace(problem, workload=replace(workload, cost=cost))
        placement = JointSolver(config=JointConfig(rounds=2)).solve(asked)
        loads.append(asked.rank_loads(placement.placement.rank_of())[:, 0].mean())
    assert loads[1] < 0.6 * loads[0]


def test_an_interrupted_search_keeps_its_best(rng):
    problem = modelled(big_problem(rng))
    rounds = rounds_of(problem, SearchProfile())
    rounds.runner.stop[0] = 1
    rounds.round(10**9, 60.0)
    assert rounds.runner.interrupted
    problem.check(place(problem, rounds.rank_of))


# The search that walks tokens.


def test_the_dearer_moves_are_the_fewer_are_made(rng):
    problem = modelled(big_problem(rng))
    stay = place(problem, start_ranks(problem)[0])
    unit = problem.objective_value(stay) * 1e-4
    values, moves = [], []
    for each in (0.0, unit, 1.0):
        config = JointConfig(stay=stay, move_seconds=each, rounds=4)
        solution = JointSolver(config=config).solve(problem)
        moved = int((solution.placement.rank_of() != stay.rank_of()).sum())
        assert solution.value + each * moved <= problem.objective_value(stay)
        values.append(solution.value)
        moves.append(moved)
    assert moves[0] > moves[1] > moves[2] == 0
    assert max(values[:2]) < values[2]


def with_slots(problem, spare):
    return replace(problem, slots_per_rank=problem.slots_per_rank + spare)


def test_spare_slots_are_filled_around_what_is_in_use(rng):
    problem = with_slots(modelled(big_problem(rng)), 1)
    stay = place(problem, start_ranks(problem)[0])
    filled = []
    for each in (0.0, 1.0):
        config = JointConfig(stay=stay, move_seconds=each, rounds=2)
        solution = JointSolver(config=config).solve(problem)
        problem.check(solution.placement)
        copies = fetched_replicas(stay, solution.placement).size
        assert solution.value + each * copies <= problem.objective_value(stay)
        filled.append(solution.placement)
    assert filled[0].has_replicas
    np.testing.assert_array_equal(replicas_of(filled[1]), replicas_of(stay))


def test_a_placement_in_use_may_hold_replicas(rng):
    problem = with_slots(modelled(big_problem(rng)), 1)
    stay = get_solver("eplb").solve(problem).placement
    assert stay.has_replicas
    value = problem.objective_value(stay)
    saved, moves = [], []
    for each in (0.0, value * 1e-4, 1.0):
        config = JointConfig(stay=stay, move_seconds=each, rounds=2)
        solution = JointSolver(config=config).solve(problem)
        problem.check(solution.placement)
        copies = fetched_replicas(stay, solution.placement).size
        assert solution.value + each * copies <= value
        saved.append(value - solution.value)
        moves.append(copies)
    assert moves[0] >= moves[1] > moves[2] == 0
    assert saved[0] > 0
    assert saved[1] > 0


def test_layers_pay_each_for_itself(rng):
    """Whichever layers are taken, no other choice of layers costs less."""
    problem = modelled(big_problem(rng))
    base, other = (place(problem, rank_of) for rank_of in start_ranks(problem)[:2])
    unit = 1e-4 * problem.objective_value(base)
    for stay, move_seconds in ((base, 0.0), (base, unit), (other, unit)):
        found = layers_that_pay(
            problem, base, other, stay=stay, move_seconds=move_seconds
        )

        def cost(placement, stay=stay, each=move_seconds):
            moved = fetched_replicas(stay, placement).size
            return problem.objective_value(placement) + each * moved

        for layer in range(problem.num_layers):
            slots = found.slot_experts.copy()
            mine = (slots[layer] == base.slot_experts[layer]).all()
            source = other if mine else base
            slots[layer] = source.slot_experts[layer]
            changed = replace(found, slot_experts=slots)
            assert cost(found) <= cost(changed) * (1 + 1e-12)
    assert problem.workload.layer_seconds(base).sum() == pytest.approx(
        problem.objective_value(base)
    )


def test_trials_choose_a_profile_from_planning_data_alone(rng):
    problem = modelled(big_problem(rng))
    trace = problem.workload.traces[0]
    sequence = (np.arange(trace.num_tokens) // 10).astype(np.int32)
    workload = replace(
        problem.workload, traces=(replace(trace, sequence=sequence),), batch_tokens=100
    )
    options, runner = SolverOptions(seed=3), Interruptible()
    arguments = (options, runner, Clock(time_limit=60))
    for asked, seconds, expected in (
        (problem, 60.0, (TIME_PROFILES[0],)),  # no sequences
        (replace(problem, workload=workload), 60.0, TIME_PROFILES),
        (replace(problem, workload=workload), 1e-9, TIME_PROFILES[:1]),
    ):
        chosen = choose_profile(asked, *arguments, seconds)
        assert chosen in expected
        assert chosen == choose_profile(asked, *arguments, seconds)


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
def test_the_more_copies_count_the_fewer_there_are(rng, homes):
    problem = modelled(big_problem(rng))
    workload = replace(
        problem.workload,
        traces=(replace(problem.workload.traces[0], ranked=True),),
        cost=replace(problem.workload.cost, wire=Wire.DEDUP, homes=homes),
    )
    problem = replace(problem, workload=workload)
    copies, loads = [], []
    for weight in (0.1, 20.0):
        config = JointConfig(favour=Favour.FEW_RANKS, rank_weight=weight, rounds=3)
        placement = JointSolver(config=config).solve(problem).placement
        score = evaluate(workload.traces[0], placement, workload.cost)
        copies.append(score.remote_ranks_per_token)
        loads.append(score.imbalance_mean)
    assert copies[1] < 0.98 * copies[0]
    assert loads[1] > loads[0]


@pytest.mark.parametrize(
    "weight", [0, -1.0, 1e7, float("inf"), float("nan"), "1", True]
)
def test_a_weight_of_copies_is_a_positive_number(weight):
    with pytest.raises(SolverError, match="rank_weight must be > 0"):
        JointConfig(favour=Favour.FEW_RANKS, rank_weight=weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"favour": "speed"}, InvalidProblemError, "one of time, few-ranks, trace"),
        ({"move_seconds": -1}, SolverError, "move_seconds must be >= 0 s"),
        ({"move_seconds": float("nan")}, SolverError, "move_seconds must be >= 0 s"),
        ({"rounds": -1}, SolverError, "rounds must be a whole number >= 0"),
        ({"rounds": 1.5}, SolverError, "rounds must be a whole number >= 0"),
        ({"patience": 0}, SolverError, "patience must be a whole number >= 1"),
    ],
)
def test_senseless_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        JointConfig(**options)


def core_arguments(rng, monkeypatch):
    """What `LayerRounds` hands to the core's `SearchProblem`, and its start."""
    found = {}
    monkeypatch.setattr(_core, "SearchProblem", lambda **arguments: found | arguments)
    rounds = rounds_of(modelled(big_problem(rng)), SearchProfile())
    monkeypatch.undo()
    return rounds._search, rounds._members


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scenario_begin", lambda x: x + 1, "scenario_begin must run from 0"),
        ("load", lambda x: x[:, :1].copy(), "load must be"),
        ("active", lambda x: x[:1].copy(), "active must be"),
        ("row_scale", lambda x: x[:-1].copy(), "row_scale must be"),
        ("weight", lambda x: x[:-1].copy(), "weight must be"),
        ("token", lambda x: x[1:].copy(), "token must be"),
        ("token", lambda x: x - 1, "token must be >= 0"),
        ("ranks_per_node", lambda x: x - 1, "ranks_per_node must divide"),
        ("rates", lambda x: x.of_nodes([1.0, 1.0]), "ranks_per_node must divide"),
        ("home", lambda _: np.zeros(1, np.int32), "home must be"),
        ("stay_rank", lambda _: np.zeros((1, 1), np.int32), "stay_rank must be"),
    ],
)
def test_the_core_refuses_what_would_make_it_read_elsewhere(
    rng, monkeypatch, name, change, message
):
    arguments, _ = core_arguments(rng, monkeypatch)
    arguments[name] = change(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        _core.SearchProblem(**arguments)


def test_the_core_refuses_a_start_on_no_rank(rng, monkeypatch):
    arguments, members = core_arguments(rng, monkeypatch)
    options = search_options(SolverOptions(), 1, 1.0, 0, hot=1.0, cold=0.1)
    problem, stop = _core.SearchProblem(**arguments), np.zeros(1, np.int32)
    for start, message in (
        (members + 1, "start holds 8, outside 0..7"),
        (members[:, :-1].copy(), "start must be"),
        (members[:1].copy(), "start must be"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.search_layers(problem, options, start, stop)
    with pytest.raises(ValueError, match="wanted the home of each token"):
        _core.search_tokens(problem, options, members, stop)


def test_a_search_problem_keeps_its_arrays(rng, monkeypatch):
    """The core reads them long after whoever made them has let them go."""
    arguments, members = core_arguments(rng, monkeypatch)
    options = search_options(SolverOptions(), 200, 60.0, 0, hot=1.0, cold=0.1)
    stop = np.zeros(1, np.int32)
    kept = _core.SearchProblem(**arguments)
    expected, _ = _core.search_layers(kept, options, members, stop)
    copies = {
        name: value.copy() if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    problem = _core.SearchProblem(**copies)
    del copies
    for _ in range(8):  # would write where they were
        rng.integers(0, 9, (1000, 64))
    found, _ = _core.search_layers(problem, options, members, stop)
    assert found.tolist() == expected.tolist()


def test_a_long_round_takes_its_time_on_two_ranks(rng):
    """Half of the pairs are on one rank: a draw that finds none must not end it."""
    problem = modelled(
        random_problem(rng, 1, 8, Topology(num_ranks=2, ranks_per_node=2))
    )
    rounds = rounds_of(problem, SearchProfile())
    start = members(problem, rounds.start)
    began = time.monotonic()
    rounds.anneal(start, 10**9, 0.1, 1, np.zeros(1, np.int32))
    assert time.monotonic() - began >= 0.1


def test_the_bound_that_is_shown_holds_for_the_optimum(rng):
    problem = modelled(
        random_problem(rng, 2, 5, Topology(num_ranks=2, ranks_per_node=1))
    )
    told = []
    solver = JointSolver(config=JointConfig(rounds=2))
    solution = solver.solve(problem, progress=told.append)
    truth = oracle(problem).value
    assert 0 < solution.lower_bound <= truth <= solution.value
    assert {event.bound for event in told} == {solution.lower_bound}
    assert solution.stages[-1].value == solution.value
    hurried = solver.solve(problem, SolverOptions(time_limit=1))
    assert hurried.lower_bound is None


def test_ctrl_c_between_two_searches_keeps_what_was_found(rng, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    topology = Topology(num_ranks=4, ranks_per_node=2)
    plain = random_problem(rng, 3, 16, topology, slots_per_rank=5)
    problem = replace(plain, objective=Objective.MODELLED_TIME)
    config = JointConfig(rounds=3, profile=NOTHING_MORE)
    monkeypatch.setattr("moetuner.solver.joint.run.filled", press)
    found = JointSolver(config=config).solve(problem)
    assert found.status is SolveStatus.INTERRUPTED
    assert [stage.name for stage in found.stages][-1] == "layers"
    assert found.value == problem.objective_value(found.placement)
    assert found.value < min(map(problem.objective_value, quick_placements(problem)))


def test_ctrl_c_while_the_last_value_is_told_keeps_the_placement(rng, monkeypatch):
    pressed = []

    def finish_or_press(*args, **options):
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return finish(*args, **options)

    problem = modelled(big_problem(rng))
    config = JointConfig(rounds=2, profile=NOTHING_MORE)
    monkeypatch.setattr("moetuner.solver.joint.solver.finish", finish_or_press)
    found = JointSolver(config=config).solve(problem)
    assert found.status is SolveStatus.INTERRUPTED
    assert found.value < min(map(problem.objective_value, quick_placements(problem)))


def test_replicas_are_never_worse_than_none(rng, monkeypatch):
    """Not even where the walk prefers what is only as good as the quick methods."""
    problem = modelled(big_problem(rng))
    roomy = replace(problem, slots_per_rank=problem.slots_per_rank + 1)
    quick = min(quick_placements(roomy), key=roomy.objective_value)

    def begin(walk, placements, clock):
        walk.placement, walk._least = quick, -np.inf

    monkeypatch.setattr(TokenRounds, "begin", begin)
    solver = JointSolver(config=JointConfig(rounds=2))
    found = solver.solve(roomy)
    layers, _, tokens = found.stages[-3:]
    assert (layers.name, tokens.name) == ("layers", "tokens")
    assert found.value <= layers.value < roomy.objective_value(quick)
