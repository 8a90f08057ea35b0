"""The search of layers: its cost, its rounds, its end."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_problems import (
    NOTHING_MORE,
    anneal,
    big_problem,
    exchange_seconds,
    modelled,
    problems,
    rounds_of,
)
from moetuner.evaluation.cost import Wire
from moetuner.placement.topology import Topology
from moetuner.solver.base import place
from moetuner.solver.heuristics.starts import start_ranks
from moetuner.solver.joint import layers
from moetuner.solver.joint.scenarios import POOLED, SearchProfile, members
from strategies import random_problem


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


def test_more_rounds_are_never_worse_in_search_cost(rng):
    rounds = rounds_of(modelled(big_problem(rng)), SearchProfile())
    totals = []
    for length in (100, 200, 400, 400):
        rounds.round(length, 60.0)
        totals.append(rounds.cost.sum())
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]


def test_an_interrupted_search_keeps_its_best(rng):
    problem = modelled(big_problem(rng))
    rounds = rounds_of(problem, SearchProfile())
    rounds.runner.stop[0] = 1
    rounds.round(10**9, 60.0)
    assert rounds.runner.interrupted
    problem.check(place(problem, rounds.rank_of))


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


def test_only_rounds_that_know_their_way_fill_their_time(rng, monkeypatch):
    """The others shall be alike; by rounds, where none is settled, all are."""
    rounds, filled = rounds_of(modelled(big_problem(rng)), NOTHING_MORE), []
    made = layers.search_options

    def seen(*arguments, **options):
        filled.append(options["fills_time"])
        return made(*arguments, **options | {"fills_time": False})

    monkeypatch.setattr(layers, "search_options", seen)
    rounds.round(20, 1000.0)
    assert filled
    assert not any(filled)
    filled.clear()
    rounds.settle()
    rounds.round(20, 1000.0)
    assert filled
    assert all(filled)
