"""What the core is handed: bad arrays are refused, good ones are kept."""

import numpy as np
import pytest
from joint_problems import big_problem, modelled, rounds_of
from moetuner import _core
from moetuner.solver import SolverOptions
from moetuner.solver.joint.layers import search_options
from moetuner.solver.joint.scenarios import SearchProfile


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
